//! Where each setting comes from: the order of the sources, and messages that name the right one.

use std::collections::HashMap;
use std::error::Error as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use genvideo::config::{Config, Error, Flags, Origin};
use tempfile::TempDir;

/// A user with a home and a current folder of its own.
struct Desk {
    dir: TempDir,
    env: HashMap<String, String>,
    flags: Flags,
}

impl Desk {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        for folder in ["home/.config/genvideo", "project"] {
            fs::create_dir_all(dir.path().join(folder)).expect("the folder can be made");
        }
        let home = dir.path().join("home").to_string_lossy().into_owned();
        let env = HashMap::from([("HOME".to_owned(), home)]);
        Self { dir, env, flags: Flags::default() }
    }

    fn path(&self, relative: &str) -> PathBuf {
        self.dir.path().join(relative)
    }

    fn env(mut self, name: &str, value: &str) -> Self {
        self.env.insert(name.to_owned(), value.to_owned());
        self
    }

    fn file(self, relative: &str, text: &str) -> Self {
        fs::write(self.path(relative), text).expect("the file can be written");
        self
    }

    fn dotenv(self, text: &str) -> Self {
        self.file("project/.env", text)
    }

    fn toml(self, text: &str) -> Self {
        self.file("home/.config/genvideo/config.toml", text)
    }

    fn resolve(&self) -> Result<Config, Error> {
        let env = |name: &str| self.env.get(name).cloned();
        Config::resolve_in(&self.path("project"), &self.flags, &env)
    }

    fn config(&self) -> Config {
        self.resolve().expect("the settings are good")
    }

    /// The message of the refusal, with the temporary folder cut out.
    fn refusal(&self) -> String {
        let error = self.resolve().expect_err("the settings are bad");
        error.to_string().replace(&self.dir.path().display().to_string(), "")
    }
}

fn origin(config: &Config, key: &str) -> Origin {
    let found = config.origins().iter().find(|resolved| resolved.key == key);
    found.expect("every setting has an origin").origin.clone()
}

#[test]
fn defaults_need_nothing_but_a_home() {
    let desk = Desk::new();
    let config = desk.config();
    assert_eq!(config.data_dir, desk.path("home/.local/share/genvideo"));
    assert_eq!(config.store, desk.path("home/.local/share/genvideo/store"));
    assert_eq!(config.cache_dir, desk.path("home/.cache/genvideo"));
    assert_eq!(config.models_dirs, [desk.path("home/.local/share/genvideo/models")]);
    assert_eq!(config.hf_home, desk.path("home/.cache/huggingface"));
    assert_eq!(config.hf_cache, desk.path("home/.cache/huggingface/hub"));
    assert_eq!((config.hf_endpoint, config.hf_token, config.hf_offline), (None, None, false));
    assert_eq!(config.extra_model_paths, Vec::<std::path::PathBuf>::new());
    assert_eq!((config.device.as_str(), config.dtype.as_str()), ("auto", "auto"));
    assert_eq!((config.image_model, config.video_model), (None, None));
    assert_eq!((config.temporal_address, config.namespace.as_str()), (None, "default"));
    assert_eq!(config.task_queue, genvideo::job::TASK_QUEUE);
    assert_eq!(config.heartbeat_timeout, Duration::from_secs(10));
    assert_eq!(config.drain_deadline, Duration::from_secs(30));
    assert_eq!((config.temporal_cli, config.threads), (None, None));
    let config = desk.config();
    assert_eq!((config.memory_limit, config.disk_quota, config.keep_results), (None, None, None));
    assert!(config.shared_store);
    assert_eq!(config.origins().len(), 28);
    assert!(config.origins().iter().all(|resolved| resolved.origin == Origin::Default));
    assert!(config.origins()[0].value.ends_with("/home/.local/share/genvideo"));
    for resolved in config.origins() {
        assert!(genvideo::config::variable(resolved.key).is_some(), "{}", resolved.key);
    }
}

#[test]
fn the_hub_is_set_by_the_variables_of_its_own_tools() {
    let desk = Desk::new()
        .toml("extra_model_paths = [\"a.yaml\", \"/b.yaml\"]\nhf_offline = true")
        .env("HUGGINGFACE_HUB_CACHE", "/old")
        .env("HF_HUB_CACHE", "/cache")
        .env("HF_ENDPOINT", "http://mirror.example:8080/")
        .env("HF_TOKEN", "hf_secret");
    let config = desk.config();
    assert_eq!(config.hf_cache, Path::new("/cache"));
    assert_eq!(config.hf_endpoint.as_deref(), Some("http://mirror.example:8080"));
    assert!(config.hf_offline);
    let files = [desk.path("home/.config/genvideo/a.yaml"), "/b.yaml".into()];
    assert_eq!(config.extra_model_paths, files);
    assert_eq!(config.hf_token.as_ref().map(|token| token.reveal()), Some("hf_secret"));
    assert!(!format!("{config:?}").contains("hf_secret"), "a token is shown nowhere");

    let offline = |name, value| Desk::new().env(name, value).config().hf_offline;
    for (value, wanted) in [("1", true), ("TRUE", true), ("yes", true), ("0", false)] {
        assert_eq!(offline("HF_HUB_OFFLINE", value), wanted, "{value}");
        assert_eq!(offline("TRANSFORMERS_OFFLINE", value), wanted, "{value}");
    }
    let refusal = Desk::new().env("HF_TOKEN", "hf secret").refusal();
    assert_eq!(refusal, "variable `HF_TOKEN` is `(not shown)`, wanted an access token of the hub");
}

#[test]
fn the_stronger_source_wins() {
    let toml = "device = \"cuda:1\"";
    let mut desk = Desk::new().toml(toml);
    let user_file = desk.path("home/.config/genvideo/config.toml");
    let check = |desk: &Desk, device: &str, from: Origin| {
        let config = desk.config();
        assert_eq!((config.device.as_str(), origin(&config, "device")), (device, from));
    };
    check(&desk, "cuda:1", Origin::File(user_file, "device"));
    desk = desk.file("project/genvideo.toml", "device = \"metal\"");
    check(&desk, "metal", Origin::File(desk.path("project/genvideo.toml"), "device"));
    desk = desk.dotenv("GENVIDEO_DEVICE=cuda");
    check(&desk, "cuda", Origin::DotEnv(desk.path("project/.env"), "GENVIDEO_DEVICE"));
    desk = desk.env("GENVIDEO_DEVICE", "CPU");
    check(&desk, "cpu", Origin::Variable("GENVIDEO_DEVICE"));
    desk.flags.device = Some("auto".to_owned());
    check(&desk, "auto", Origin::Flag("--device".to_owned()));
}

#[test]
fn sources_add_up_key_by_key() {
    let desk = Desk::new()
        .toml("threads = 4\nheartbeat_timeout = 20\nmodels_dirs = [\"~/sd\", \"more\"]\nlog = \"debug\"")
        .dotenv("TEMPORAL_ADDRESS=127.0.0.1:7233\nHF_HOME=hf")
        .env("XDG_DATA_HOME", "/data")
        .env("XDG_CACHE_HOME", "relative/is/ignored")
        .env("TEMPORAL_NAMESPACE", "video")
        .env("RUST_LOG", "trace")
        .env("GENVIDEO_DRAIN_DEADLINE", "1.5s")
        .env("GENVIDEO_DTYPE", "  ");
    let config = desk.config();
    assert_eq!(config.threads, Some(4));
    assert_eq!(config.heartbeat_timeout, Duration::from_secs(20));
    let models = [desk.path("home/sd"), desk.path("home/.config/genvideo/more")];
    assert_eq!(config.models_dirs, models);
    assert_eq!(config.temporal_address.as_deref(), Some("127.0.0.1:7233"));
    assert_eq!(config.hf_home, desk.path("project/hf"));
    assert_eq!(config.data_dir, Path::new("/data/genvideo"));
    assert_eq!(config.cache_dir, desk.path("home/.cache/genvideo"));
    assert_eq!((config.namespace.as_str(), config.log.as_str()), ("video", "trace"));
    assert_eq!(config.drain_deadline, Duration::from_millis(1500));
    assert_eq!(origin(&config, "dtype"), Origin::Default);
    let desk = desk.env("GENVIDEO_MODELS_DIR", "/a:b");
    assert_eq!(desk.config().models_dirs, [PathBuf::from("/a"), desk.path("project/b")]);
}

#[test]
fn a_named_file_is_read_instead_of_the_usual_ones_and_must_exist() {
    let mut desk =
        Desk::new().toml("device = \"cuda\"").file("project/mine.toml", "dtype = \"f16\"");
    desk.flags.config = Some("mine.toml".into());
    let config = desk.config();
    assert_eq!((config.device.as_str(), config.dtype.as_str()), ("auto", "f16"));
    desk.flags.config = None;
    let desk = desk.env("GENVIDEO_CONFIG", "absent.toml");
    assert_eq!(desk.refusal(), "`/project/absent.toml` cannot be read");
    assert!(desk.resolve().unwrap_err().source().is_some());
}

#[test]
fn a_dotenv_is_read_as_a_shell_would() {
    for (line, expected) in [
        ("GENVIDEO_IMAGE_MODEL=a", "a"),
        ("export GENVIDEO_IMAGE_MODEL = a b # comment", "a b"),
        ("GENVIDEO_IMAGE_MODEL='a # \"b\"' # comment", "a # \"b\""),
        ("GENVIDEO_IMAGE_MODEL=\"a \\\"b\\\" \\$c\"", "a \"b\" $c"),
        ("GENVIDEO_IMAGE_MODEL=a#b", "a#b"),
        ("\u{feff}GENVIDEO_IMAGE_MODEL=a\r", "a"),
        ("# GENVIDEO_IMAGE_MODEL=b\nGENVIDEO_IMAGE_MODEL=b\n\nGENVIDEO_IMAGE_MODEL=a", "a"),
        ("SECRET=\"never closed\nGENVIDEO_IMAGE_MODEL=a", "a"),
        ("GENVIDEO_GOLDENS=/x\nGENVIDEO_IMAGE_MODEL=a", "a"),
    ] {
        let config = Desk::new().dotenv(line).config();
        assert_eq!(config.image_model.as_deref(), Some(expected), "{line}");
    }
    let desk = Desk::new();
    fs::create_dir(desk.path("project/.env")).unwrap();
    desk.config();
}

#[test]
fn refusals_name_source_value_and_what_is_allowed() {
    let mut flagged = Desk::new();
    flagged.flags.heartbeat_timeout = Some("10 ms".to_owned());
    for (desk, expected) in [
        (
            flagged,
            "flag `--heartbeat-timeout` is `10 ms`, wanted a time from 1s to 1h, such as `10s`",
        ),
        (
            Desk::new().env("GENVIDEO_DEVICE", "gpu"),
            "variable `GENVIDEO_DEVICE` is `gpu`, wanted `auto`, `cpu`, `cuda`, `cuda:N` or `metal`",
        ),
        (
            Desk::new().dotenv("TEMPORAL_ADDRESS=localhost"),
            "`TEMPORAL_ADDRESS` in `/project/.env` is `localhost`, wanted an address such as `127.0.0.1:7233`",
        ),
        (
            Desk::new().toml("threads = 0"),
            "`threads` in `/home/.config/genvideo/config.toml` is `0`, wanted `auto` or a whole number from 1 to 1024",
        ),
        (
            Desk::new().toml("device = [\"cpu\"]"),
            "`device` in `/home/.config/genvideo/config.toml` is `[\"cpu\"]`, \
             wanted `auto`, `cpu`, `cuda`, `cuda:N` or `metal`",
        ),
        (
            Desk::new().toml("data_dir = 5"),
            "`data_dir` in `/home/.config/genvideo/config.toml` is `5`, wanted a folder",
        ),
        (
            Desk::new().dotenv("A=1\nGENVIDEO_DEVICE='cpu"),
            "`/project/.env` line 2: a single quote is not closed on its line",
        ),
    ] {
        assert_eq!(desk.refusal(), expected);
    }
}

#[test]
fn misspelt_names_are_refused_with_the_known_ones() {
    let text = Desk::new().toml("log = \"info\"\ndevise = \"cpu\"").refusal();
    let start =
        "`/home/.config/genvideo/config.toml` sets the unknown `devise`, known are `data_dir`,";
    assert!(text.starts_with(start), "{text}");
    let text = Desk::new().dotenv("GENVIDEO_DEVISE=cpu").refusal();
    let start =
        "`/project/.env` sets the unknown `GENVIDEO_DEVISE`, known are `GENVIDEO_DATA_DIR`,";
    assert!(text.starts_with(start), "{text}");
    let text = Desk::new().toml("device = \"cpu\"\ndevice = \"cuda\"").refusal();
    assert!(text.starts_with("`/home/.config/genvideo/config.toml` line 2: "), "{text}");
}

#[test]
fn values_are_what_their_setting_wants() {
    let check = |name: &str, good: &[&str], bad: &[&str]| {
        for value in good {
            let outcome = Desk::new().env(name, value).resolve();
            assert!(outcome.is_ok(), "{name}={value}: {outcome:?}");
        }
        for value in bad {
            let outcome = Desk::new().env(name, value).resolve();
            assert!(matches!(outcome, Err(Error::Value { .. })), "{name}={value}: {outcome:?}");
        }
    };
    check("GENVIDEO_DEVICE", &["cuda:0", "Metal"], &["cuda:", "cuda:x", "cpu:0", "cuda:-1"]);
    check("GENVIDEO_DTYPE", &["bf16", "F32"], &["f64", "half"]);
    check("GENVIDEO_THREADS", &["1", "auto", "1024"], &["0", "-1", "2.5", "1025"]);
    check("GENVIDEO_HEARTBEAT_TIMEOUT", &["1", "90 s", "1h"], &["0", "999ms", "2h", "1d", "s"]);
    check(
        "GENVIDEO_DISK_QUOTA",
        &["none", "50GB", "1.5 tib", "7"],
        &["0", "GB", "-1", "5 XB", "1e400"],
    );
    check("GENVIDEO_STORE", &["/videos", "s3://videos/team"], &[]);
    check("GENVIDEO_KEEP_RESULTS", &["forever", "30d", "1"], &["0", "0d", "1h", "-1d"]);
    check("GENVIDEO_DRAIN_DEADLINE", &["0", "2m", "1h", "250ms"], &["-1", "61m", "1e400"]);
    let addresses = ["127.0.0.1:7233", "[::1]:7233", "temporal:7233", "https://host:443/"];
    check("TEMPORAL_ADDRESS", &addresses, &["host", ":7233", "host:0", "host:99999", "a b:1"]);
}
