//! Stages that are stopped anywhere and taken up again end in the bytes of a run that nobody disturbed.

use genvideo::engine::Sampler;
use genvideo::store::BlobRef;

use super::*;

/// A job as small as the models make it, kept under `name`.
fn small(bench: &Bench, name: &str, fields: &Value) -> Order {
    let mut order = Order { job_key: JobKey::of_workflow(name), ..bench.order(fields.clone()) };
    if let Some(image) = &mut order.plan.image {
        image.size = (64, 64);
    }
    if let Some(video) = &mut order.plan.video {
        video.size = (64, 64);
        (video.frames_per_run, video.decode_chunk) = (6, 2);
    }
    order
}

/// Checkpoints in the store, and the notes of the newest.
fn checkpoints(bench: &Bench) -> Vec<PathBuf> {
    let is_one = |path: &PathBuf| {
        let folder = path.parent().and_then(Path::file_name).and_then(|name| name.to_str());
        folder.is_some_and(|name| name == "image" || name.starts_with("video-"))
            || path.extension().is_some_and(|end| end == "at")
    };
    bench.files_of("work").into_iter().filter(is_one).collect()
}

/// The hashes of what a stage made.
fn hashes(blobs: &[&BlobRef]) -> Vec<String> {
    blobs.iter().map(|blob| blob.sha256.clone()).collect()
}

/// Runs `stage` until its `stop_at`-th report (or its end); gives back its last checkpoint when it was stopped. Reports
/// of loading do not count: a model may be there already.
fn attempt<T>(
    stop_at: usize,
    stage: impl FnOnce(&mut dyn FnMut(Report) -> ControlFlow<()>) -> Result<T, Error>,
) -> (Option<T>, Option<String>, Vec<Report>) {
    let mut seen: Vec<Report> = Vec::new();
    let outcome = stage(&mut |report| {
        if report.stage != "load" {
            seen.push(report);
        }
        if seen.len() >= stop_at { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    let checkpoint = seen.last().and_then(|report| report.checkpoint.as_deref().map(str::to_owned));
    match outcome {
        Ok(made) => (Some(made), checkpoint, seen),
        Err(Error::Stopped) => (None, checkpoint, seen),
        Err(other) => panic!("{other}"),
    }
}

/// Steps done when the first denoising report of an attempt comes.
fn first_step(seen: &[Report]) -> Option<u64> {
    seen.iter().find(|report| report.stage == "denoise").map(|report| report.done)
}

#[test]
fn an_image_goes_on_from_any_report_with_the_same_bytes() {
    let fields = json!({"steps": 4, "sampler": "euler_a", "guidance": 5.0});
    let bench = bench();
    let quiet = small(&bench, "quiet", &fields);
    let (made, _, seen) = attempt(usize::MAX, |hook| bench.renderer.gen_image(&quiet, hook));
    let made = made.unwrap();
    let wanted = hashes(&[&made.image, &made.delivered]);
    let first = seen.iter().position(|report| report.stage == "denoise").unwrap();
    for stop_at in [1, first + 1, first + 2, seen.len() / 2, seen.len() - 2, seen.len()] {
        let mut order = small(&bench, &format!("stopped at {stop_at}"), &fields);
        let (made, checkpoint, before) =
            attempt(stop_at, |hook| bench.renderer.gen_image(&order, hook));
        assert!(made.is_none(), "stopped at {stop_at} of {}", seen.len());
        let steps = before.iter().filter(|report| report.stage == "denoise");
        let steps = steps.map(|report| report.done).max().unwrap_or(0);
        assert_eq!(checkpoint.is_some(), steps > 0, "{before:?}");
        // The store knows it too, should the word of it have been lost.
        order.resume = checkpoint.filter(|_| stop_at % 2 == 0);
        let (made, _, after) = attempt(usize::MAX, |hook| bench.renderer.gen_image(&order, hook));
        let made = made.unwrap();
        assert_eq!(hashes(&[&made.image, &made.delivered]), wanted, "stopped at {stop_at}");
        assert!(
            made.work.notes.iter().all(|note| !note.contains("twice")),
            "{:?}",
            made.work.notes
        );
        match first_step(&after) {
            Some(step) => assert_eq!(step, steps, "no step is made twice"),
            None => assert_eq!(steps, 4, "denoised before"),
        }
    }
}

#[test]
fn every_sampler_goes_on_from_what_it_stored() {
    let bench = bench();
    for sampler in Sampler::ALL.iter().map(|sampler| sampler.name()) {
        let fields = json!({"steps": 6, "sampler": sampler});
        let quiet = small(&bench, &format!("quiet {sampler}"), &fields);
        let (made, ..) = attempt(usize::MAX, |hook| bench.renderer.gen_image(&quiet, hook));
        let wanted = made.unwrap().image;
        let mut order = small(&bench, sampler, &fields);
        let fourth = |report: &Report| report.stage == "denoise" && report.done == 4;
        let mut checkpoint = None;
        let stopped = bench.renderer.gen_image(&order, &mut |report| {
            checkpoint = report.checkpoint.as_deref().map(str::to_owned);
            if fourth(&report) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        assert!(matches!(stopped, Err(Error::Stopped)) && checkpoint.is_some(), "{sampler}");
        order.resume = checkpoint;
        let (made, _, after) = attempt(usize::MAX, |hook| bench.renderer.gen_image(&order, hook));
        assert_eq!(first_step(&after), Some(4), "{sampler}");
        assert_eq!(made.unwrap().image, wanted, "{sampler}");
    }
}

#[test]
fn frames_go_on_from_any_report_with_the_same_bytes() {
    let fields = json!({"job_type": "VIDEO", "duration": 0.5, "fps": 8});
    let bench = bench();
    let order = small(&bench, "quiet", &fields);
    let image = bench.renderer.gen_image(&order, &mut go_on).unwrap().image;
    let (made, _, seen) =
        attempt(usize::MAX, |hook| bench.renderer.gen_video(&order, &image, 0, hook));
    let made = made.unwrap();
    let wanted = hashes(&[&made.frames, &made.last_frame]);
    let in_decode = seen.iter().rposition(|report| report.stage == "decode").unwrap();
    let in_denoise = seen.iter().rposition(|report| report.stage == "denoise").unwrap();
    for stop_at in [in_denoise / 2, in_denoise, in_decode, in_decode + 1] {
        let mut order = small(&bench, &format!("stopped at {stop_at}"), &fields);
        let image = bench.renderer.gen_image(&order, &mut go_on).unwrap().image;
        let (made, checkpoint, _) =
            attempt(stop_at, |hook| bench.renderer.gen_video(&order, &image, 0, hook));
        assert!(made.is_none(), "stopped at {stop_at} of {}", seen.len());
        order.resume = checkpoint;
        let (made, _, after) =
            attempt(usize::MAX, |hook| bench.renderer.gen_video(&order, &image, 0, hook));
        let made = made.unwrap();
        assert_eq!(hashes(&[&made.frames, &made.last_frame]), wanted, "stopped at {stop_at}");
        if stop_at > in_denoise {
            assert_eq!(first_step(&after), None, "denoised before");
        }
    }
}

#[test]
fn a_checkpoint_of_no_use_means_starting_over_and_saying_so() {
    let fields = json!({"steps": 3, "seed": 11});
    let bench = bench();
    let order = small(&bench, "test", &fields);
    let wanted = bench.renderer.gen_image(&order, &mut go_on).unwrap();
    bench.renderer.cleanup(&order.job_key).unwrap();

    let other = small(&bench, "other", &json!({"steps": 4}));
    let mut foreign = Vec::new();
    let stopped = bench.renderer.gen_image(&other, &mut |report| match report.checkpoint {
        Some(sha256) => {
            let kept = bench.store().get_checkpoint(&other.job_key, "image", &sha256).unwrap();
            foreign = kept.to_vec();
            ControlFlow::Break(())
        }
        None => ControlFlow::Continue(()),
    });
    assert!(matches!(stopped, Err(Error::Stopped)));
    let put = |content: &[u8]| {
        bench.store().put_checkpoint(&order.job_key, "image", content).unwrap().sha256
    };
    let noise = put(b"no checkpoint");
    for bad in [put(&foreign), noise.clone(), "0".repeat(64), "no hash".to_owned()] {
        put(b"no checkpoint");
        put(&foreign);
        bench.store().mark_stage(&order.job_key, "image", &noise).unwrap();
        let again = Order { resume: Some(bad.clone()), ..order.clone() };
        let (made, _, seen) = attempt(usize::MAX, |hook| bench.renderer.gen_image(&again, hook));
        let made = made.unwrap();
        assert_eq!(first_step(&seen), Some(0), "{bad}");
        assert_eq!(
            hashes(&[&made.image, &made.delivered]),
            hashes(&[&wanted.image, &wanted.delivered])
        );
        assert!(
            made.work.notes.iter().any(|note| note.contains("made twice")),
            "{bad}: {:?}",
            made.work.notes
        );
        bench.store().unsettle_stage(&order.job_key, "image").unwrap();
    }
}

#[test]
fn a_finished_stage_is_found_and_not_made_again() {
    let bench = bench();
    let fields = json!({"job_type": "VIDEO", "duration": 0.5, "fps": 8});
    let order = small(&bench, "test", &fields);
    let made = bench.made(&order, &mut go_on).unwrap();
    let mut reports = 0;
    let again = bench.made(&order, &mut |_| {
        reports += 1;
        ControlFlow::Continue(())
    });
    assert_eq!((again.unwrap(), reports), (made.clone(), 0));

    // Another order under the same name, and a result whose file is gone, are no results.
    let other =
        small(&bench, "test", &json!({"job_type": "VIDEO", "duration": 0.5, "fps": 8, "steps": 3}));
    let image = bench.renderer.gen_image(&other, &mut go_on).unwrap();
    assert_ne!(image.delivered, made.image.delivered);
    let file = bench.root().join(format!("work/{}/{}", order.job_key, image.image.sha256));
    fs::remove_file(file).unwrap();
    let mended = bench.renderer.gen_image(&other, &mut go_on).unwrap();
    assert_eq!(mended.image, image.image);
    bench.store().get_work(&order.job_key, &image.image.sha256).unwrap();
}

#[test]
fn a_finished_stage_keeps_no_checkpoint_not_even_of_who_comes_late() {
    let bench = bench();
    let order = small(&bench, "test", &json!({"steps": 4}));
    let other = Renderer::new(settings(Store::open(&bench.root()).unwrap()));
    let (mut held, mut theirs) = (None, None);
    // This attempt was frozen while another one finished; it goes on from its own memory.
    let mine = bench.renderer.gen_image(&order, &mut |report| {
        if theirs.is_none() && report.checkpoint.is_some() {
            assert_eq!(checkpoints(&bench).len(), 2, "a checkpoint and the note of it");
            held = report.checkpoint.as_deref().map(str::to_owned);
            theirs = Some(other.gen_image(&order, &mut go_on).unwrap());
            assert_eq!(checkpoints(&bench), Vec::<PathBuf>::new());
        }
        ControlFlow::Continue(())
    });
    let mine = mine.unwrap();
    assert_eq!((Some(&mine), held.is_some()), (theirs.as_ref(), true));
    assert_eq!(checkpoints(&bench), Vec::<PathBuf>::new());
    // And one that still names a checkpoint which is gone has nothing to do.
    let late = Order { resume: held, ..order };
    let again = other.gen_image(&late, &mut |report| panic!("{report:?}")).unwrap();
    assert_eq!(again, mine);
}

#[test]
fn a_job_that_nobody_goes_on_with_keeps_no_checkpoints() {
    let bench = bench();
    for stop_at in [2, u64::MAX] {
        let result = bench.renderer.render_all(&job(json!({})), 7, &mut |report| {
            assert_eq!(report.checkpoint, None);
            assert_eq!(checkpoints(&bench), Vec::<PathBuf>::new());
            let stops = report.stage == "denoise" && report.done >= stop_at;
            if stops { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        assert_eq!(result.is_ok(), stop_at == u64::MAX);
    }
}
