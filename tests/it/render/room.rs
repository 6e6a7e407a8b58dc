//! Jobs that the store has no room for are refused before they begin.

use genvideo::job::class::ErrorClass;

use super::*;

#[test]
fn a_job_over_the_quota_is_refused_before_the_work() {
    let folder = tempfile::tempdir().unwrap();
    let renderer = |quota| {
        let store = Store::open(&folder.path().join("store")).unwrap();
        Renderer::new(Settings { disk_quota: Some(quota), ..settings(store) })
    };
    let input = json!({
        "prompt": "a red ball", "job_type": "IMAGE", "width": 64, "height": 64, "user_id": USER, "steps": 1,
    });
    let job = parse::valid(input.to_string().as_bytes()).unwrap();
    let refused = renderer(10_000).plan(&job, 1).unwrap_err();
    assert_eq!(class(&refused), ErrorClass::DiskFull, "{refused}");
    assert!(refused.to_string().contains("quota"), "{refused}");
    let roomy = renderer(1_000_000);
    roomy.render_all(&job, 1, &mut |_| ControlFlow::Continue(())).unwrap();
    // What is there already counts: before a job, before a stage of one that was planned earlier, and before its result.
    let [early, late] = ["early", "late"].map(|name| {
        let plan = roomy.plan(&job, 1).unwrap();
        Order::new(JobKey::of_workflow(name), job.clone(), plan)
    });
    let other = JobKey::of_workflow("other");
    let fill = || roomy.store().put_blob(&other, &vec![7; 990_000]).map(drop);
    let refused = roomy.gen_image(&early, &mut |report| {
        if report.stage == "denoise" {
            fill().unwrap();
        }
        ControlFlow::Continue(())
    });
    let refused = refused.unwrap_err();
    assert_eq!(class(&refused), ErrorClass::DiskFull, "{refused}");
    assert!(refused.to_string().contains("a result"), "{refused}");
    let refused = roomy.gen_image(&late, &mut |report| panic!("{report:?}")).unwrap_err();
    assert_eq!(class(&refused), ErrorClass::DiskFull, "{refused}");
    assert!(refused.to_string().contains("stage `image`"), "{refused}");
    assert_eq!(class(&roomy.plan(&job, 1).unwrap_err()), ErrorClass::DiskFull);
    roomy.cleanup(&other).unwrap();
    roomy.gen_image(&late, &mut go_on).unwrap();
}
