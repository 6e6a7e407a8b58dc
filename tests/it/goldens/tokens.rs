//! Token ids with the full CLIP vocabulary, rebuilt from its merges.

use std::collections::BTreeSet;
use std::fs;
use std::io::Read;
use std::path::Path;

use genvideo::engine::prompt::PromptTokenizer;
use serde_json::{Map, Value, json as value};

use super::{golden, json};

const ENTRIES: usize = 49_408;

/// A tokenizer folder of the real vocabulary that pads with `pad`.
fn tokenizer(pad: &str) -> PromptTokenizer {
    let folder = tempfile::tempdir().unwrap();
    let mut merges = String::new();
    let packed = fs::File::open(golden("tokenizer/merges.txt.gz")).unwrap();
    flate2::read::GzDecoder::new(packed).read_to_string(&mut merges).unwrap();
    let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
    write("merges.txt", &merges);
    write("vocab.json", &Value::Object(vocabulary(&merges)).to_string());
    // As the published files of Stable Diffusion 2: an old config that contradicts the map.
    let config = value!({"model_max_length": 77, "pad_token": "<|endoftext|>"});
    write("tokenizer_config.json", &config.to_string());
    write("special_tokens_map.json", &value!({"pad_token": {"content": pad}}).to_string());
    PromptTokenizer::load(folder.path(), 77, ENTRIES).unwrap()
}

/// The byte symbols, the same at the end of a word, one entry a merge, begin and end.
fn vocabulary(merges: &str) -> Map<String, Value> {
    let mut bytes: Vec<u32> = (0x21..=0x7e).chain(0xa1..=0xac).chain(0xae..=0xff).collect();
    let plain: BTreeSet<u32> = bytes.iter().copied().collect();
    let others = (0..256).filter(|byte| !plain.contains(byte)).count();
    bytes.extend((0..others).map(|index| 256 + u32::try_from(index).unwrap()));
    let symbols: Vec<String> =
        bytes.into_iter().map(|code| char::from_u32(code).unwrap().to_string()).collect();
    let ends = symbols.iter().map(|symbol| format!("{symbol}</w>"));
    let merged = merges
        .lines()
        .skip(1)
        .filter(|line| !line.is_empty())
        .map(|line| line.replacen(' ', "", 1));
    let specials = ["<|startoftext|>", "<|endoftext|>"].map(str::to_string);
    let all = symbols.iter().cloned().chain(ends).chain(merged).chain(specials);
    let vocabulary: Map<String, Value> =
        all.enumerate().map(|(id, token)| (token, Value::from(id))).collect();
    assert_eq!(vocabulary.len(), ENTRIES);
    vocabulary
}

fn ids(value: &Value) -> Option<Vec<u32>> {
    value
        .as_array()
        .map(|ids| ids.iter().map(|id| u32::try_from(id.as_u64().unwrap()).unwrap()).collect())
}

#[test]
fn prompts_get_the_ids_of_transformers() {
    for (pad, pad_id) in [("<|endoftext|>", 49_407), ("!", 0)] {
        let tokenizer = tokenizer(pad);
        for prompt in json("tokenizer/prompts.json").as_array().unwrap() {
            let text = prompt["text"].as_str().unwrap();
            let other = ids(&prompt["ids_when_pad_is_bang"]).filter(|_| pad == "!");
            let wanted = other.clone().or_else(|| ids(&prompt["ids"])).unwrap();
            assert_eq!(tokenizer.ids(text).unwrap(), wanted, "{text:?} padded with {pad}");

            let tokens = tokenizer.encode(text).unwrap();
            let mut padded = wanted.clone();
            if padded.len() > 77 {
                padded.truncate(76);
                padded.push(49_407);
                if other.is_none() {
                    assert_eq!(Some(&padded), ids(&prompt["truncated77"]).as_ref(), "{text:?}");
                }
            }
            assert_eq!(tokens.cut as usize, wanted.len().saturating_sub(77), "{text:?}");
            assert_eq!(tokens.used as usize, padded.len() - 2, "{text:?}");
            padded.resize(77, pad_id);
            assert_eq!(tokens.ids, padded, "{text:?} padded with {pad}");
        }
    }
}

#[test]
fn both_file_layouts_of_a_tokenizer_give_the_same_ids() {
    let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/genvideo-tiny-t2i/tokenizer");
    let pair = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(&shipped).unwrap() {
        let path = entry.unwrap().path();
        if path.file_name().unwrap() != "tokenizer.json" {
            fs::copy(&path, pair.path().join(path.file_name().unwrap())).unwrap();
        }
    }
    let [whole, pair] =
        [shipped.as_path(), pair.path()].map(|path| PromptTokenizer::load(path, 32, 4913).unwrap());
    for text in [
        "",
        "a cute kitten playing in a garden",
        "一只可爱的小猫在花园里玩耍",
        "IT'S  5 o'clock!",
        "🦊<|endoftext|>",
    ] {
        assert_eq!(whole.encode(text).unwrap(), pair.encode(text).unwrap(), "{text:?}");
    }
    let error = PromptTokenizer::load(&shipped, 32, 4910).unwrap_err();
    assert!(error.to_string().contains("4910"), "{error}");
    assert!(PromptTokenizer::load(Path::new("/nowhere"), 32, 4913).is_err());
}
