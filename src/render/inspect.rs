//! What a file is and contains: weights by their header, pictures and films by the texts that tell how they were made.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::Serialize;
use serde_json::Value;

use super::Error;
use crate::engine::inspect::{Contents, contents};
use crate::media::{probe, texts};

/// Largest picture that is read.
const MAX_PNG: u64 = 256 << 20;

/// A file at a glance.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "file", rename_all = "snake_case")]
pub enum Inspected {
    /// Weights of a model, or of a LoRA.
    Weights(Contents),
    /// A picture.
    Png {
        /// Width in pixels.
        width: u32,
        /// Height in pixels.
        height: u32,
        /// How it was made, where it says so in a way that is known.
        generation: Option<Generation>,
        /// Every text it carries, by keyword.
        texts: BTreeMap<String, String>,
    },
    /// A film.
    Mp4 {
        /// Width in pixels.
        width: u32,
        /// Height in pixels.
        height: u32,
        /// Frames.
        frames: u32,
        /// Frames per second.
        fps: f64,
        /// Seconds.
        duration: f64,
        /// Codec.
        codec: String,
        /// How it was made, where it says so in a way that is known.
        generation: Option<Generation>,
        /// Every text it carries, by key.
        texts: BTreeMap<String, String>,
    },
}

/// How a picture or film was made.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Generation {
    /// `genvideo`, `a1111` or `comfyui`.
    pub tool: &'static str,
    /// The prompt.
    pub prompt: String,
    /// What was to be avoided.
    pub negative: String,
    /// The other settings by the tool's own names.
    pub settings: BTreeMap<String, String>,
}

/// Looks at the file at `path`; its content decides what it is.
pub fn inspect(path: &Path) -> Result<Inspected, Error> {
    let unreadable = |source| crate::engine::Error::Io { path: path.to_path_buf(), source };
    let mut head = Vec::new();
    if path.is_file() {
        File::open(path)
            .and_then(|file| file.take(12).read_to_end(&mut head))
            .map_err(unreadable)?;
    }
    if head.starts_with(b"\x89PNG") {
        let mut bytes = Vec::new();
        File::open(path)
            .and_then(|file| file.take(MAX_PNG).read_to_end(&mut bytes))
            .map_err(unreadable)?;
        let found = texts::read(&bytes)?;
        let texts: BTreeMap<String, String> = found.texts.into_iter().collect();
        let generation = generation(&texts);
        return Ok(Inspected::Png { width: found.width, height: found.height, generation, texts });
    }
    if head.get(4..8) == Some(b"ftyp") {
        let found = probe::probe(path)?;
        let texts: BTreeMap<String, String> = found.metadata.into_iter().collect();
        return Ok(Inspected::Mp4 {
            width: found.width,
            height: found.height,
            frames: found.frames,
            fps: found.fps.fps(),
            duration: found.duration,
            codec: found.codec,
            generation: generation(&texts),
            texts,
        });
    }
    Ok(Inspected::Weights(contents(path)?))
}

/// How the texts say that it was made: our own record, then ComfyUI's graph, then A1111's lines.
pub fn generation(texts: &BTreeMap<String, String>) -> Option<Generation> {
    let json = |key: &str| serde_json::from_str::<Value>(texts.get(key)?).ok();
    if let Some(record) = json("genvideo") {
        return Some(own(&record));
    }
    if let Some(made) = json("prompt").as_ref().and_then(comfyui) {
        return Some(made);
    }
    texts.get("parameters").map(|text| a1111(text))
}

/// Our own record: prompts, and every other value by its path.
fn own(record: &Value) -> Generation {
    let text = |key: &str| record[key].as_str().unwrap_or_default().to_owned();
    let mut settings = BTreeMap::new();
    for (key, value) in record.as_object().into_iter().flatten() {
        if key == "prompt" || key == "negative_prompt" {
            continue;
        }
        match value {
            Value::Object(inner) => {
                for (inner, value) in inner {
                    settings.insert(format!("{key}.{inner}"), shown(value));
                }
            }
            Value::Null => {}
            value => {
                settings.insert(key.clone(), shown(value));
            }
        }
    }
    Generation {
        tool: "genvideo",
        prompt: text("prompt"),
        negative: text("negative_prompt"),
        settings,
    }
}

fn shown(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// ComfyUI's graph of nodes: the first sampler, and what is wired to it.
fn comfyui(graph: &Value) -> Option<Generation> {
    let nodes = graph.as_object()?;
    let class = |node: &Value| node["class_type"].as_str().unwrap_or_default().to_owned();
    let sampler = nodes.values().find(|node| class(node).contains("KSampler"))?;
    let mut made = Generation { tool: "comfyui", ..Generation::default() };
    let inputs = &sampler["inputs"];
    for (key, value) in inputs.as_object().into_iter().flatten() {
        // A list is a wire to another node.
        if !value.is_array() {
            made.settings.insert(key.clone(), shown(value));
        }
    }
    made.prompt = text_behind(graph, &inputs["positive"], 0);
    made.negative = text_behind(graph, &inputs["negative"], 0);
    for node in nodes.values() {
        for (key, value) in node["inputs"].as_object().into_iter().flatten() {
            if ["ckpt_name", "lora_name", "vae_name", "unet_name"].contains(&key.as_str()) {
                let listed = made.settings.entry(key.clone()).or_default();
                let comma = if listed.is_empty() { "" } else { ", " };
                listed.push_str(&format!("{comma}{}", shown(value)));
            }
        }
        if class(node).contains("EmptyLatent") {
            let side = |key: &str| node["inputs"][key].as_u64();
            if let (Some(width), Some(height)) = (side("width"), side("height")) {
                made.settings.insert("size".to_owned(), format!("{width}x{height}"));
            }
        }
    }
    Some(made)
}

/// The text that the wire leads to, through a few nodes at most.
fn text_behind(graph: &Value, wire: &Value, depth: u32) -> String {
    const DEEPEST: u32 = 8;
    if let Some(text) = wire.as_str() {
        return text.to_owned();
    }
    let Some(node) = wire[0].as_str().filter(|_| depth < DEEPEST).map(|id| &graph[id]) else {
        return String::new();
    };
    let inputs = &node["inputs"];
    ["text", "text_g", "string", "value", "conditioning", "conditioning_1", "positive"]
        .iter()
        .map(|key| text_behind(graph, &inputs[*key], depth + 1))
        .find(|text| !text.is_empty())
        .unwrap_or_default()
}

/// Prompt, `Negative prompt: …`, and a last line of `key: value` with commas between.
fn a1111(text: &str) -> Generation {
    let mut made = Generation { tool: "a1111", ..Generation::default() };
    let lines: Vec<&str> = text.trim_end().lines().collect();
    let (texts, last) = match lines.split_last() {
        Some((last, texts)) if last.starts_with("Steps: ") || last.contains(", Seed: ") => {
            (texts, *last)
        }
        _ => (lines.as_slice(), ""),
    };
    let (mut prompt, mut negative, mut in_negative) = (Vec::new(), Vec::new(), false);
    for line in texts {
        if let Some(first) = line.strip_prefix("Negative prompt:") {
            in_negative = true;
            negative.push(first.trim_start());
        } else if in_negative {
            negative.push(line);
        } else {
            prompt.push(*line);
        }
    }
    made.prompt = prompt.join("\n");
    made.negative = negative.join("\n");
    for pair in pairs(last) {
        if let Some((key, value)) = pair.split_once(':') {
            let value = value.trim();
            // A value that holds a comma or a colon is written as JSON.
            let value = serde_json::from_str::<String>(value).unwrap_or_else(|_| value.to_owned());
            made.settings.insert(key.trim().to_owned(), value);
        }
    }
    made
}

/// Splits at commas outside quotes.
fn pairs(line: &str) -> Vec<String> {
    let (mut pairs, mut quoted, mut escaped) = (vec![String::new()], false, false);
    for letter in line.chars() {
        if letter == ',' && !quoted {
            pairs.push(String::new());
            continue;
        }
        if letter == '"' && !escaped {
            quoted = !quoted;
        }
        escaped = letter == '\\' && !escaped;
        if let Some(last) = pairs.last_mut() {
            last.push(letter);
        }
    }
    pairs
}
