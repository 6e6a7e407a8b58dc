//! Nothing but a pull wants a network: commands run where there is none.

use std::process::{Command, Stdio};

use crate::cli::{Machine, finish};

#[expect(clippy::print_stderr, reason = "a test that shows nothing says so")]
/// Whether this system lets anybody make a place without network; says so when not.
fn has_namespaces() -> bool {
    let tried = Command::new("unshare").args(["-rn", "true"]).stderr(Stdio::null()).status();
    let works = tried.is_ok_and(|status| status.success());
    if !works {
        eprintln!("not shown: this system has no network namespaces for its users");
    }
    works
}

#[test]
fn without_a_network_everything_but_a_pull_works() {
    if !has_namespaces() {
        return;
    }
    let machine = Machine::new();
    let checkpoint =
        concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/goldens/single_file/sd1.safetensors");
    let render = ["render", "a red apple", "--job", "image", "--size", "64x64", "--steps", "1"];
    let cases: &[(&[&str], i32, &str)] = &[
        (&["models", "list"], 0, "sdxl-base"),
        (&["models", "show", "svd-xt"], 0, "genvideo models pull svd-xt"),
        (&["models", "verify"], 0, "no model was pulled"),
        (&["models", "verify", "svd-xt"], 4, "genvideo models pull svd-xt"),
        (&["models", "import", checkpoint, "--name", "mine"], 0, "mine.safetensors"),
        (&["models", "verify", "mine"], 0, "ok "),
        (&["models", "remove", "mine", "--yes"], 0, "removed mine"),
        (&["inspect", checkpoint], 0, "checkpoint of"),
        (&render, 0, ".png"),
        (&["render", "a cat", "--image-model", "sdxl-base"], 4, "genvideo models pull sdxl-base"),
        (
            &["render", "a cat", "--image-model", "someone/thing"],
            4,
            "genvideo models pull someone/thing",
        ),
        (&["models", "pull", "sd15"], 4, "hint: "),
    ];
    for (arguments, code, wanted) in cases {
        let inner = machine.command(arguments);
        let mut command = Command::new("unshare");
        command.arg("-rn").arg(inner.get_program()).args(inner.get_args());
        command.current_dir(machine.path("work")).stdin(Stdio::null());
        for (name, value) in inner.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        let answer = finish(command);
        assert_eq!(answer.code, Some(*code), "{arguments:?}\n{}{}", answer.stdout, answer.stderr);
        let said = format!("{}{}", answer.stdout, answer.stderr);
        assert!(said.contains(wanted), "{arguments:?}\n{said}");
    }
}
