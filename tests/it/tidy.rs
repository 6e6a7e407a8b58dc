//! The module order of ARCHITECTURE.md and the file rules of CONTRIBUTING.md, checked.

use std::fs;
use std::path::{Path, PathBuf};

/// What every module may name: calls that do nothing outside tests, and what the disk says.
const ANYBODYS: &[&str] = &["failpoint", "disk"];

/// Which top-level modules each one may name. Order: lowest layer first.
const MAY_NAME: &[(&str, &[&str])] = &[
    ("failpoint", &[]),
    ("disk", &[]),
    ("job", &[]),
    ("config", &[]),
    ("devserver", &[]),
    ("store", &[]),
    ("media", &[]),
    ("hub", &[]),
    ("engine", &[]),
    ("render", &["job", "engine", "media", "store", "hub"]),
    ("worker", &["job", "config", "store", "hub", "render"]),
    ("client", &["job", "config", "worker"]),
    (
        "cli",
        &["job", "config", "devserver", "store", "hub", "engine", "render", "worker", "client"],
    ),
];

/// Crates that only the listed modules may name.
const OWNERS: &[(&str, &[&str])] = &[
    ("candle_core", &["engine"]),
    ("candle_nn", &["engine"]),
    ("gemm", &["engine"]),
    ("safetensors", &["engine"]),
    ("tokenizers", &["engine"]),
    ("ffmpeg_next", &["media"]),
    ("fast_image_resize", &["media", "engine"]),
    ("object_store", &["store"]),
    ("rust_embed", &["hub"]),
    ("hf_hub", &["hub"]),
    ("yaml_rust2", &["hub"]),
    ("etcetera", &["config"]),
    ("temporalio_client", &["worker", "client"]),
    ("temporalio_common", &["worker", "client"]),
    ("temporalio_macros", &["worker", "client"]),
    ("temporalio_sdk", &["worker", "client"]),
    ("temporalio_workflow", &["worker", "client"]),
    ("clap", &["cli"]),
    ("indicatif", &["cli"]),
    ("anyhow", &["cli", "main"]),
];

/// Words that would make `worker/workflow.rs` replay differently.
const NOT_IN_WORKFLOW: &[&str] = &[
    "SystemTime",
    "Instant",
    "Uuid",
    "rand",
    "tokio",
    "fs",
    "env",
    "println",
    "HashMap",
    "HashSet",
    "Path",
    "PathBuf",
];

/// Attributes that put a name on the wire, and where that name is given.
const NAMED_ATTRIBUTES: &[&str] = &["activity", "run", "signal", "query", "update"];

/// File names that say nothing.
const EMPTY_NAMES: &[&str] = &["mod.rs", "utils.rs", "helpers.rs", "common.rs", "manager.rs"];

/// Paths of the machine somebody worked on.
const MACHINE_PATHS: &[&str] = &["/work/", "/root/", "/tmp/w/"];

const MAX_FILE_LINES: usize = 600;
const MAX_FUNCTION_LINES: usize = 80;

#[track_caller]
fn none(faults: &[String]) {
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn modules_name_only_lower_layers() {
    let mut faults = Vec::new();
    for source in sources() {
        let module = source.module();
        let Some((_, allowed)) = MAY_NAME.iter().find(|(name, _)| *name == module) else {
            assert!(matches!(module, "lib" | "main"), "`{module}` has no layer in tidy.rs");
            continue;
        };
        for named in crate_paths(&source.code()) {
            if named != module
                && !ANYBODYS.contains(&named.as_str())
                && !allowed.contains(&named.as_str())
            {
                faults.push(format!("{}: `{module}` may not name `{named}`", source.name));
            }
        }
    }
    none(&faults);
}

#[test]
fn foreign_crates_stay_in_their_module() {
    let mut faults = Vec::new();
    for source in sources() {
        for (krate, owners) in OWNERS {
            let named = source.code().lines().any(|line| names_crate(line, krate));
            if named && !owners.contains(&source.module()) {
                faults.push(format!("{}: `{krate}` belongs to {owners:?}", source.name));
            }
        }
    }
    none(&faults);
}

#[test]
fn workflow_code_can_replay() {
    let mut faults = Vec::new();
    for source in sources().iter().filter(|source| source.name == "worker/workflow.rs") {
        for line in source.code().lines() {
            let mut words = line.split(|c: char| !c.is_alphanumeric() && c != '_');
            if let Some(word) = words.find(|word| NOT_IN_WORKFLOW.contains(word)) {
                faults.push(format!("{}: `{word}` in {line}", source.name));
            }
        }
    }
    none(&faults);
}

#[test]
fn names_on_the_wire_are_written_out() {
    let mut faults = Vec::new();
    for source in sources().iter().filter(|source| source.module() == "worker") {
        for line in source.code().lines().map(str::trim) {
            if !names_the_wire(line) {
                faults.push(format!("{}: {line} has no `name = …`", source.name));
            }
        }
    }
    none(&faults);
}

#[test]
fn features_hide_in_few_files() {
    let mut faults = Vec::new();
    let theirs = ["engine/device.rs", "failpoint.rs", "store/bucket.rs"];
    for source in sources().iter().filter(|source| !theirs.contains(&source.name.as_str())) {
        let code = source.code();
        let bare = code.replace([' ', '\n'], "");
        if ["cfg(feature", "cfg!(feature", "cfg(not(feature", "cfg(any(feature", "cfg(all(feature"]
            .iter()
            .any(|text| bare.contains(text))
        {
            faults.push(format!("{}: `cfg(feature)` belongs to {theirs:?}", source.name));
        }
    }
    none(&faults);
}

#[test]
fn settings_are_named_in_one_file() {
    let mut faults = Vec::new();
    for source in sources().iter().filter(|source| source.name != "config.rs") {
        // A name in full; the bare prefix and comments are free.
        let code = source.code();
        let mut names = code.split("GENVIDEO_").skip(1);
        let named = names.any(|rest| rest.starts_with(|c: char| c.is_ascii_uppercase()));
        if named {
            faults.push(format!("{}: `GENVIDEO_…` names belong to config.rs", source.name));
        }
    }
    none(&faults);
}

#[test]
fn files_open_with_a_doc_line_and_stay_short() {
    let mut faults = Vec::new();
    for source in sources().iter().chain(&tests()) {
        if !source.text.starts_with("//!") {
            faults.push(format!("{}: no `//!` line at the top", source.name));
        }
        let file = source.name.rsplit('/').next().unwrap_or_default();
        if EMPTY_NAMES.contains(&file) {
            faults.push(format!("{}: a file name that says nothing", source.name));
        }
    }
    for source in sources() {
        let body = source.code_and_comments().lines().count();
        if body > MAX_FILE_LINES {
            faults.push(format!("{}: {body} lines, limit {MAX_FILE_LINES}", source.name));
        }
        for (name, lines) in functions(&source.code_and_comments()) {
            if lines > MAX_FUNCTION_LINES {
                let limit = MAX_FUNCTION_LINES;
                faults.push(format!("{}: `{name}` has {lines} lines, limit {limit}", source.name));
            }
        }
    }
    none(&faults);
}

#[test]
fn no_file_knows_the_machine_it_was_written_on() {
    let mut faults = Vec::new();
    for folder in ["src", "tests", "scripts", "docs", "benches", "models"] {
        for (file, text) in
            texts(&root().join(folder), &["rs", "md", "toml", "sh", "py", "txt", ""])
        {
            // This file has to name what it looks for.
            if file.ends_with("tests/it/tidy.rs") {
                continue;
            }
            for (index, line) in text.lines().enumerate() {
                if MACHINE_PATHS.iter().any(|path| is_machine_path(line, path)) {
                    let file = file.strip_prefix(root()).unwrap_or(&file);
                    faults.push(format!("{}:{}: {line}", file.display(), index + 1));
                }
            }
        }
    }
    none(&faults);
}

#[test]
fn nothing_is_ignored_or_left_to_do() {
    let mut faults = Vec::new();
    for source in sources().iter().chain(&tests()) {
        if source.name == "it/tidy.rs" {
            continue;
        }
        for mark in ["#[ignore", "todo!(", "unimplemented!(", "thread::sleep(", "time::sleep("] {
            let product_may_wait = mark.contains("sleep") && !source.name.starts_with("it/");
            if !product_may_wait && source.code().contains(mark) {
                faults.push(format!("{}: `{mark}`", source.name));
            }
        }
    }
    none(&faults);
}

#[test]
fn links_of_the_documents_lead_somewhere() {
    let mut faults = Vec::new();
    for document in ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "models/README.md"] {
        let path = root().join(document);
        let text = fs::read_to_string(&path).expect("every document is there");
        let targets = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        for target in targets.filter(|target| !target.starts_with("http")) {
            let file = target.split('#').next().unwrap_or_default();
            if !file.is_empty() && !path.with_file_name(file).exists() {
                faults.push(format!("{document}: `{target}`"));
            }
        }
    }
    none(&faults);
}

#[test]
fn the_checks_find_what_they_look_for() {
    assert_eq!(crate_paths("use crate::{a::B, c};\nuse crate::d::E;"), ["a", "c", "d"]);
    assert!(names_crate("let x = clap::Parser;", "clap"));
    assert!(!names_crate("let x = my_clap::Parser;", "clap"));
    assert!(names_the_wire("#[activity(name = \"gen_image\")]"));
    assert!(names_the_wire("#[activities]"));
    assert!(!names_the_wire("#[activity]"));
    assert!(!names_the_wire("#[run(x = 1)]"));
    let text = "fn a() {\n    1\n}\n\nimpl B {\n    pub(crate) async fn b(\n        x: u8,\n    ) {\n    }\n    \
                fn c(\n    ) -> u8;\n    fn d() {\n    }\n}\n";
    let expected = [("a", 3), ("b", 4), ("c", 2), ("d", 2)];
    let expected = expected.map(|(name, lines)| (name.to_owned(), lines));
    assert_eq!(functions(text), expected);
    assert!(is_machine_path("cd /work/x", "/work/"));
    assert!(!is_machine_path("<root>/work/x", "/work/"));
}

/// A path at its start, not the middle of another.
fn is_machine_path(line: &str, path: &str) -> bool {
    line.match_indices(path).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        before.is_none_or(|c| !c.is_alphanumeric() && !"./>}_-~*".contains(c))
    })
}

/// Whether a line is not an attribute that needs a name, or has it.
fn names_the_wire(line: &str) -> bool {
    let Some(attribute) = line.strip_prefix("#[") else { return true };
    let end = attribute.find(|c: char| !c.is_alphanumeric() && c != '_' && c != ':');
    let path = &attribute[..end.unwrap_or(attribute.len())];
    let name = path.rsplit("::").next().unwrap_or(path);
    !NAMED_ATTRIBUTES.contains(&name) || attribute.contains("name =")
}

/// Functions with their lengths: from the line of `fn` to the closing brace at its indentation, as rustfmt writes it, or
/// to the end of a declaration.
fn functions(text: &str) -> Vec<(String, usize)> {
    let lines: Vec<&str> = text.lines().collect();
    let mut found = Vec::new();
    for (start, line) in lines.iter().enumerate() {
        let bare = line.trim_start();
        let indent = line.len() - bare.len();
        let Some((before, rest)) = bare.split_once("fn ") else { continue };
        let qualifiers = ["pub", "pub(crate)", "pub(super)", "const", "async", "unsafe"];
        if !before.split_whitespace().all(|word| qualifiers.contains(&word)) {
            continue;
        }
        let (close, declared) = (format!("{:indent$}}}", ""), format!("{:indent$})", ""));
        let is_end =
            |line: &&str| *line == close || line.starts_with(&declared) && line.ends_with(';');
        let one_line = bare.ends_with('}') || bare.ends_with(';');
        let length = lines[start..].iter().position(is_end).filter(|_| !one_line);
        let name = rest.split(|c: char| !c.is_alphanumeric() && c != '_').next();
        found.push((name.unwrap_or_default().to_owned(), length.map_or(1, |length| length + 1)));
    }
    found
}

/// Top-level modules named through `crate::`, groups included.
fn crate_paths(code: &str) -> Vec<String> {
    let mut found = Vec::new();
    for rest in code.split("crate::").skip(1) {
        match rest.strip_prefix('{') {
            None => found.extend(ident(rest)),
            Some(group) => {
                let mut depth = 0;
                let mut item = String::new();
                for c in group.chars() {
                    match c {
                        '{' => depth += 1,
                        '}' if depth == 0 => break,
                        '}' => depth -= 1,
                        ',' if depth == 0 => found.extend(ident(item.drain(..).as_str())),
                        c => item.push(c),
                    }
                }
                found.extend(ident(&item));
            }
        }
    }
    found
}

fn ident(text: &str) -> Option<String> {
    let name: String =
        text.trim_start().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
    name.starts_with(char::is_lowercase).then_some(name)
}

fn names_crate(line: &str, krate: &str) -> bool {
    line.match_indices(krate).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        !before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == '"' || c == ':')
            && line[at + krate.len()..].starts_with("::")
    })
}

/// A Rust file, named by its path under `src` or `tests`.
struct Source {
    name: String,
    text: String,
}

impl Source {
    fn module(&self) -> &str {
        let first = self.name.split('/').next().unwrap_or_default();
        first.strip_suffix(".rs").unwrap_or(first)
    }

    /// Without the unit tests at its end.
    fn code_and_comments(&self) -> String {
        self.text.split("#[cfg(test)]\nmod tests").next().unwrap_or(&self.text).to_owned()
    }

    /// Without comment lines.
    fn code(&self) -> String {
        let lines = self.text.lines().filter(|line| !line.trim_start().starts_with("//"));
        lines.collect::<Vec<_>>().join("\n")
    }
}

fn sources() -> Vec<Source> {
    rust_files(&root().join("src"))
}

fn tests() -> Vec<Source> {
    rust_files(&root().join("tests"))
}

fn rust_files(folder: &Path) -> Vec<Source> {
    let files = texts(folder, &["rs"]);
    let name = |file: &Path| {
        let relative = file.strip_prefix(folder).expect("listed under the folder");
        relative.to_string_lossy().replace('\\', "/")
    };
    files.into_iter().map(|(file, text)| Source { name: name(&file), text }).collect()
}

/// Every text file under a folder with one of the extensions, in order; nothing when there is no folder.
fn texts(folder: &Path, extensions: &[&str]) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        for path in entries.flatten().map(|entry| entry.path()) {
            let extension = path.extension().unwrap_or_default().to_string_lossy().into_owned();
            if path.is_dir() {
                folders.push(path);
            } else if extensions.contains(&extension.as_str()) {
                found.extend(fs::read_to_string(&path).ok().map(|text| (path, text)));
            }
        }
    }
    found.sort();
    found
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}
