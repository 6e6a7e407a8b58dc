//! A renderer with the embedded models and a store of its own.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::mpsc;

use genvideo::hub::{Library, Places};
use genvideo::render::{Order, Renderer, Settings};
use genvideo::store::{JobKey, Store};

/// A renderer whose results go to `store`.
pub(crate) fn renderer(store: &Path, folder: &Path) -> Renderer {
    let places = Places {
        models_dirs: Vec::new(),
        cache_dir: super::process_folder().join("cache"),
        hf_home: folder.join("hf"),
    };
    Renderer::new(Settings {
        store: Store::open(store).expect("a store"),
        library: Library::open(places),
        device: "cpu".to_owned(),
        dtype: "f32".to_owned(),
        memory: "auto".to_owned(),
        checkpoint_every: std::time::Duration::from_secs(1),
        threads: None,
        memory_limit: None,
        disk_quota: None,
        image_model: None,
        video_model: None,
    })
}

/// The device, taken by a thread that works on something else.
pub(crate) struct Held {
    release: mpsc::Sender<()>,
    thread: std::thread::JoinHandle<()>,
}

impl Held {
    /// Takes the device of `renderer` with a job that stops in its first step.
    pub(crate) fn device(renderer: &Renderer) -> Self {
        let renderer = renderer.clone();
        let (release, released) = mpsc::channel();
        let (taken, is_taken) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let input = super::job("IMAGE", serde_json::json!({}));
            let job =
                genvideo::job::parse::valid(input.to_string().as_bytes()).expect("a valid job");
            let key = JobKey::of_workflow("held");
            let plan = renderer.plan(&job, 1).expect("a plan");
            let order = Order::new(key.clone(), job, plan);
            let mut waiting = true;
            let stopped = renderer.gen_image(&order, &mut |report| {
                if report.stage != "denoise" {
                    return ControlFlow::Continue(());
                }
                if waiting {
                    waiting = false;
                    taken.send(()).expect("the test waits");
                    released.recv().expect("the test releases");
                }
                ControlFlow::Break(())
            });
            assert!(matches!(stopped, Err(genvideo::render::Error::Stopped)), "{stopped:?}");
            renderer.cleanup(&key).expect("nothing stays");
        });
        is_taken.recv_timeout(super::PATIENCE).expect("the device is taken");
        Self { release, thread }
    }

    /// Gives the device back.
    pub(crate) fn release(self) {
        self.release.send(()).expect("the thread waits");
        self.thread.join().expect("no panic");
    }
}
