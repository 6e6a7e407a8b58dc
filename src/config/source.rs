//! Where texts of settings come from, and the choice between them.
//!
//! Each source is read into the same shape, so that [`super::Config`] asks for a key and does not care where it was
//! set.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use super::{CONFIG_VARIABLE, Flags, Resolved, SETTINGS, SWITCH, SYSTEM_FILE, TEST_VARIABLES};
use super::{dotenv, value};

/// The setting whose value goes into no message.
const SECRET: &str = "hf_token";
/// Largest configuration file or `.env`.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// One row of the table of settings.
pub(super) struct Setting {
    pub(super) key: &'static str,
    pub(super) variables: &'static [&'static str],
    pub(super) wanted: &'static str,
}

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A flag of the command line.
    Flag(String),
    /// A variable of the environment.
    Variable(&'static str),
    /// A variable in a `.env` file.
    DotEnv(PathBuf, &'static str),
    /// A key in a configuration file.
    File(PathBuf, &'static str),
    /// Built in.
    Default,
}

impl fmt::Display for Origin {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag(flag) => write!(formatter, "flag `{flag}`"),
            Self::Variable(name) => write!(formatter, "variable `{name}`"),
            Self::DotEnv(file, name) => write!(formatter, "`{name}` in `{}`", file.display()),
            Self::File(file, key) => write!(formatter, "`{key}` in `{}`", file.display()),
            Self::Default => write!(formatter, "default"),
        }
    }
}

/// Why settings could not be resolved.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A value its setting does not take.
    #[error("{origin} is `{value}`, wanted {wanted}")]
    Value {
        /// Where it was set.
        origin: Origin,
        /// What it was set to.
        value: String,
        /// What is allowed.
        wanted: &'static str,
    },
    /// A file that is there, or was asked for, and cannot be read.
    #[error("`{}` cannot be read", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file with faults of syntax.
    #[error("`{}` line {line}: {what}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Its line, from 1.
        line: usize,
        /// What is wrong.
        what: String,
    },
    /// A key or variable nobody reads, most likely misspelt.
    #[error("`{}` sets the unknown `{key}`, known are {known}", path.display())]
    Unknown {
        /// The file.
        path: PathBuf,
        /// The name found.
        key: String,
        /// The names we read.
        known: String,
    },
    /// No folder to put user files under.
    #[error("the home folder is not known, wanted `HOME` to name it")]
    NoHome,
}

/// The user's folders, before `genvideo` is added.
pub(super) struct BaseFolders {
    pub(super) data: PathBuf,
    pub(super) cache: PathBuf,
}

/// A text of a setting; lists have several items.
struct Raw {
    items: Vec<String>,
    origin: Origin,
    /// What relative paths are relative to.
    base: PathBuf,
}

/// The winning text of each setting, and what became of it.
pub(super) struct Sources<'a> {
    env: &'a dyn Fn(&str) -> Option<String>,
    home: Option<PathBuf>,
    found: BTreeMap<&'static str, Raw>,
    origins: Vec<Resolved>,
}

impl<'a> Sources<'a> {
    /// Reads every source, the weakest last; the first text of a key stays.
    pub(super) fn gather(
        folder: &Path,
        flags: &Flags,
        env: &'a dyn Fn(&str) -> Option<String>,
    ) -> Result<Self, Error> {
        let home = env("HOME").filter(|home| !home.is_empty()).map(PathBuf::from);
        let home = home.or_else(|| etcetera::home_dir().ok());
        let mut sources = Self { env, home, found: BTreeMap::new(), origins: Vec::new() };
        sources.take_flags(folder, flags);
        for setting in SETTINGS {
            for variable in setting.variables {
                if let Some(text) = sources.variable(variable) {
                    sources.add(setting, split(setting, &text), Origin::Variable(variable), folder);
                }
            }
        }
        sources.take_dotenv(folder)?;
        sources.take_files(folder, flags)?;
        Ok(sources)
    }

    /// A variable of the environment; an empty one counts as not set.
    fn variable(&self, name: &str) -> Option<String> {
        (self.env)(name).filter(|text| !text.trim().is_empty())
    }

    fn add(&mut self, setting: &Setting, items: Vec<String>, origin: Origin, base: &Path) {
        let raw = Raw { items, origin, base: base.to_owned() };
        self.found.entry(setting.key).or_insert(raw);
    }

    fn take_flags(&mut self, folder: &Path, flags: &Flags) {
        let path = |path: &Option<PathBuf>| -> Vec<String> {
            path.iter().map(|path| path.to_string_lossy().into_owned()).collect()
        };
        let text = |text: &Option<String>| -> Vec<String> { text.iter().cloned().collect() };
        for setting in SETTINGS {
            let items = match setting.key {
                "data_dir" => path(&flags.data_dir),
                "cache_dir" => path(&flags.cache_dir),
                "models_dirs" => {
                    flags.models_dirs.iter().map(|dir| dir.to_string_lossy().into_owned()).collect()
                }
                "device" => text(&flags.device),
                "dtype" => text(&flags.dtype),
                "memory" => text(&flags.memory),
                "image_model" => text(&flags.image_model),
                "video_model" => text(&flags.video_model),
                "temporal_address" => text(&flags.temporal_address),
                "namespace" => text(&flags.namespace),
                "task_queue" => text(&flags.task_queue),
                "heartbeat_timeout" => text(&flags.heartbeat_timeout),
                "checkpoint_interval" => text(&flags.checkpoint_interval),
                "drain_deadline" => text(&flags.drain_deadline),
                "temporal_cli" => path(&flags.temporal_cli),
                "threads" => text(&flags.threads),
                "log" => text(&flags.log),
                _ => Vec::new(),
            };
            if !items.is_empty() {
                let name = setting.key.replace("dirs", "dir").replace('_', "-");
                self.add(setting, items, Origin::Flag(format!("--{name}")), folder);
            }
        }
    }

    fn take_dotenv(&mut self, folder: &Path) -> Result<(), Error> {
        let path = folder.join(".env");
        // A folder of that name is a Python environment.
        if !path.is_file() {
            return Ok(());
        }
        let text = read_file(&path)?;
        let ours = |name: &str| {
            let foreign = TEST_VARIABLES.contains(&name);
            let prefixed = name.starts_with("GENVIDEO_") && !foreign;
            prefixed || SETTINGS.iter().any(|setting| setting.variables.contains(&name))
        };
        let lines = dotenv::read(&text, ours).map_err(|(line, what)| Error::Syntax {
            path: path.clone(),
            line,
            what: what.to_owned(),
        })?;
        for line in &lines {
            let known = |setting: &&Setting| setting.variables.contains(&line.name.as_str());
            if SETTINGS.iter().any(|setting| known(&setting)) {
                continue;
            }
            let known = SETTINGS.iter().flat_map(|setting| setting.variables);
            return Err(Error::Unknown { path, key: line.name.clone(), known: listed(known) });
        }
        for setting in SETTINGS {
            for variable in setting.variables {
                // The last line of a name wins, as in a shell.
                let line = lines.iter().rev().find(|line| line.name == *variable);
                if let Some(line) = line.filter(|line| !line.value.trim().is_empty()) {
                    let origin = Origin::DotEnv(path.clone(), variable);
                    self.add(setting, split(setting, &line.value), origin, folder);
                }
            }
        }
        Ok(())
    }

    /// The configuration files: one that was named must be there; else those that exist.
    fn take_files(&mut self, folder: &Path, flags: &Flags) -> Result<(), Error> {
        let named = flags.config.clone().or_else(|| self.variable(CONFIG_VARIABLE).map(Into::into));
        if let Some(path) = named {
            let path = self.absolute(&path.to_string_lossy(), folder);
            return self.take_file(&path);
        }
        let user = self.base("XDG_CONFIG_HOME", ".config");
        let user = user.map(|config| config.join("genvideo/config.toml"));
        let files = [Some(folder.join("genvideo.toml")), user, Some(SYSTEM_FILE.into())];
        for path in files.into_iter().flatten().filter(|path| path.is_file()) {
            self.take_file(&path)?;
        }
        Ok(())
    }

    fn take_file(&mut self, path: &Path) -> Result<(), Error> {
        let text = read_file(path)?;
        let table: toml::Table = toml::from_str(&text).map_err(|error| {
            let start = error.span().map_or(0, |span| span.start);
            let before = text.get(..start).unwrap_or_default();
            let line = before.matches('\n').count() + 1;
            let what = error.message().to_owned();
            Error::Syntax { path: path.to_owned(), line, what }
        })?;
        let folder = path.parent().unwrap_or(Path::new("/"));
        for (key, value) in table {
            let Some(setting) = SETTINGS.iter().find(|setting| setting.key == key) else {
                let known = listed(SETTINGS.iter().map(|setting| &setting.key));
                return Err(Error::Unknown { path: path.to_owned(), key, known });
            };
            let origin = Origin::File(path.to_owned(), setting.key);
            match items(setting, &value) {
                Some(items) => self.add(setting, items, origin, folder),
                None => {
                    let value = value.to_string();
                    return Err(Error::Value { origin, value, wanted: setting.wanted });
                }
            }
        }
        Ok(())
    }

    /// The value of a key, `None` when nobody set it.
    pub(super) fn one<T>(
        &mut self,
        key: &'static str,
        read: fn(&str) -> Option<T>,
    ) -> Result<Option<T>, Error> {
        let Some(raw) = self.found.get(key) else {
            self.note(key, String::new(), Origin::Default);
            return Ok(None);
        };
        let text = raw.items.join(" ");
        let origin = raw.origin.clone();
        let value = read(&text);
        let text = if key == SECRET { "(not shown)".to_owned() } else { text };
        let Some(value) = value else {
            return Err(Error::Value { origin, value: text, wanted: wanted(key) });
        };
        self.note(key, text, origin);
        Ok(Some(value))
    }

    /// The folder or file of a key.
    pub(super) fn path(&mut self, key: &'static str) -> Result<Option<PathBuf>, Error> {
        Ok(self.paths(key)?.and_then(|paths| paths.into_iter().next()))
    }

    /// The folder of a key, or the address of a bucket as it stands.
    pub(super) fn place(&mut self, key: &'static str) -> Result<Option<PathBuf>, Error> {
        let is_bucket = |raw: &Raw| raw.items.iter().any(|item| value::bucket(item).is_some());
        if self.found.get(key).is_some_and(is_bucket) {
            return Ok(self.one(key, value::bucket)?.map(PathBuf::from));
        }
        self.path(key)
    }

    /// The folders of a key.
    pub(super) fn paths(&mut self, key: &'static str) -> Result<Option<Vec<PathBuf>>, Error> {
        let Some(raw) = self.found.get(key) else {
            self.note(key, String::new(), Origin::Default);
            return Ok(None);
        };
        let origin = raw.origin.clone();
        if raw.items.is_empty() || raw.items.iter().any(|item| item.trim().is_empty()) {
            let value = raw.items.join(":");
            return Err(Error::Value { origin, value, wanted: wanted(key) });
        }
        let paths: Vec<PathBuf> =
            raw.items.iter().map(|item| self.absolute(item, &raw.base)).collect();
        self.note(key, shown(&paths), origin);
        Ok(Some(paths))
    }

    /// The value, or the default, which is then noted in its place.
    pub(super) fn or_default<T: fmt::Debug>(
        &mut self,
        key: &'static str,
        value: Option<T>,
        default: impl FnOnce() -> T,
    ) -> T {
        value.unwrap_or_else(|| {
            let value = default();
            let text = format!("{value:?}").replace(['"', '[', ']'], "");
            if let Some(resolved) = self.origins.iter_mut().find(|resolved| resolved.key == key) {
                resolved.value = text;
            }
            value
        })
    }

    fn note(&mut self, key: &'static str, value: String, origin: Origin) {
        self.origins.push(Resolved { key, value, origin });
    }

    /// What was found, in the order of the table.
    pub(super) fn into_origins(mut self) -> Vec<Resolved> {
        let place = |key| SETTINGS.iter().position(|setting| setting.key == key);
        self.origins.sort_by_key(|resolved| place(resolved.key));
        self.origins
    }

    /// The user's folders by the XDG rules, on every system.
    pub(super) fn base_folders(&self) -> Result<BaseFolders, Error> {
        let data = self.base("XDG_DATA_HOME", ".local/share").ok_or(Error::NoHome)?;
        let cache = self.base("XDG_CACHE_HOME", ".cache").ok_or(Error::NoHome)?;
        Ok(BaseFolders { data, cache })
    }

    /// An XDG folder; a relative one is to be ignored, says the standard.
    fn base(&self, variable: &str, under_home: &str) -> Option<PathBuf> {
        let set = self.variable(variable).map(PathBuf::from).filter(|path| path.is_absolute());
        set.or_else(|| self.home.as_ref().map(|home| home.join(under_home)))
    }

    fn absolute(&self, text: &str, base: &Path) -> PathBuf {
        let under_home = match text.strip_prefix('~') {
            Some(rest) if rest.is_empty() || rest.starts_with('/') => Some(rest),
            _ => None,
        };
        match (under_home, &self.home) {
            (Some(rest), Some(home)) => home.join(rest.trim_start_matches('/')),
            _ => base.join(text),
        }
    }
}

fn wanted(key: &str) -> &'static str {
    SETTINGS.iter().find(|setting| setting.key == key).map_or("", |setting| setting.wanted)
}

/// A text from the environment: lists are separated as in `PATH`.
fn split(setting: &Setting, text: &str) -> Vec<String> {
    if is_list(setting) {
        let parts = std::env::split_paths(text);
        parts
            .map(|part| part.to_string_lossy().into_owned())
            .filter(|part| !part.is_empty())
            .collect()
    } else {
        vec![text.to_owned()]
    }
}

/// A value of a configuration file as texts; `None` for a type that no setting has.
fn items(setting: &Setting, value: &toml::Value) -> Option<Vec<String>> {
    match value {
        toml::Value::String(text) => Some(vec![text.clone()]),
        toml::Value::Integer(number) if is_number(setting) => Some(vec![number.to_string()]),
        toml::Value::Float(number) if is_number(setting) => Some(vec![number.to_string()]),
        toml::Value::Boolean(on) if setting.wanted == SWITCH => Some(vec![on.to_string()]),
        toml::Value::Array(list) if is_list(setting) => {
            list.iter().map(|item| item.as_str().map(str::to_owned)).collect()
        }
        _ => None,
    }
}

fn is_list(setting: &Setting) -> bool {
    setting.wanted.starts_with("a list")
}

/// A number of something, or of seconds.
fn is_number(setting: &Setting) -> bool {
    ["a whole number", "a time", "a size", "days"].iter().any(|kind| setting.wanted.contains(kind))
}

fn shown(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

fn listed<'a>(names: impl Iterator<Item = &'a &'static str>) -> String {
    names.map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}

fn read_file(path: &Path) -> Result<String, Error> {
    let mut text = String::new();
    let read =
        fs::File::open(path).and_then(|file| file.take(MAX_FILE_BYTES).read_to_string(&mut text));
    match read {
        Ok(_) => Ok(text),
        Err(source) => Err(Error::Unreadable { path: path.to_owned(), source }),
    }
}
