//! The fields of a request in the order of the contract, each with the words for what it wants.
//!
//! One table, so that "missing", "wrong type" and "out of range" say the same thing, and how a value is shown in
//! a message: cut, and without anything that could break a line or a terminal.

/// Field names and what each wants, in the order in which faults are reported.
pub const FIELDS: &[(&str, &str)] = &[
    ("prompt", "text of 1 to 8192 bytes"),
    ("style", "the name of a style"),
    ("job_type", "`IMAGE` or `VIDEO`"),
    ("width", "an even whole number from 64 to 2048"),
    ("height", "an even whole number from 64 to 2048"),
    ("duration", "a number of seconds from 0.1 to 60"),
    ("user_id", "a label of 1 to 128 bytes without `/`, `\\`, `%` or control characters"),
    ("metadata", "an object of at most 64 KiB, nested at most 16 deep"),
    ("negative_prompt", "text of at most 8192 bytes"),
    ("seed", "a whole number from 0 to 18446744073709551615, or none for a random one"),
    ("steps", "a whole number from 1 to 150"),
    ("guidance", "a number from 0 to 30"),
    (
        "sampler",
        "one of `ddim`, `euler`, `euler_karras`, `euler_a`, `dpmpp_2m`, `dpmpp_2m_karras`, `dpmpp_2m_sde`, \
         `dpmpp_2m_sde_karras`, `unipc`, `unipc_karras`, `pndm`, `lcm`",
    ),
    ("image_model", "the name of a model, 1 to 256 bytes"),
    ("video_model", "the name of a model, 1 to 256 bytes"),
    ("fps", "a number of frames per second from 1 to 60"),
    ("motion", "a whole number from 1 to 255"),
    ("noise_aug", "a number from 0 to 1"),
    ("image", "the id of an image in the store, 64 hex digits"),
    ("strength", "a number above 0, up to 1, beside an `image`"),
    ("batch", "a whole number from 1 to 8, and only 1 for a video"),
    ("clip_skip", "a whole number from 0 to 12"),
    ("vae", "the name of a VAE file, 1 to 256 bytes"),
    ("prediction", "`epsilon` or `v_prediction`"),
    ("loras", "a list of at most 8 objects with `name` and `scale`"),
    ("size_policy", "`fit` or `exact`"),
    ("embed_metadata", "`true` or `false`"),
    ("approve", "`true` or `false`"),
    ("priority", "a whole number from 1, which goes first, to 5"),
];

/// Fields of one entry of `loras`.
pub const LORA_FIELDS: &[(&str, &str)] =
    &[("name", "the name of a file under the models folder"), ("scale", "a number from -4 to 4")];

/// What other tools call our fields.
const OTHER_NAMES: &[(&str, &str)] = &[
    ("type", "job_type"),
    ("user", "user_id"),
    ("seconds", "duration"),
    ("num_frames", "duration` and `fps"),
    ("frames", "duration` and `fps"),
    ("size", "width` and `height"),
    ("negative", "negative_prompt"),
    ("num_inference_steps", "steps"),
    ("cfg", "guidance"),
    ("cfg_scale", "guidance"),
    ("guidance_scale", "guidance"),
    ("sampler_name", "sampler"),
    ("scheduler", "sampler"),
    ("model", "image_model"),
    ("frame_rate", "fps"),
    ("motion_bucket_id", "motion"),
    ("noise_aug_strength", "noise_aug"),
    ("weight", "scale"),
    ("denoising_strength", "strength"),
    ("init_image", "image` and `strength"),
    ("batch_size", "batch"),
    ("num_images", "batch"),
    ("num_images_per_prompt", "batch"),
    ("n", "batch"),
    ("prediction_type", "prediction"),
    ("sd_vae", "vae"),
];

/// How many characters of a value a message shows.
const SHOWN_CHARS: usize = 60;

/// What the field wants; `lora` fields are found by their last part.
pub(super) fn wanted(field: &str) -> &'static str {
    let table = if field.contains('.') { LORA_FIELDS } else { FIELDS };
    let name = field.rsplit('.').next().unwrap_or(field);
    table.iter().find(|(known, _)| *known == name).map_or("", |(_, wanted)| wanted)
}

/// Place of a field, of `loras[1].scale` too, in the contract; unknown ones come last.
pub(super) fn rank(field: &str) -> usize {
    FIELDS.iter().position(|(known, _)| *known == root(field)).unwrap_or(FIELDS.len())
}

/// The top-level field of a path such as `loras[1].scale`.
pub(super) fn root(field: &str) -> &str {
    field.split(['.', '[']).next().unwrap_or(field)
}

/// `, did you mean …` for a name nobody knows, or the list of known ones.
pub(super) fn advice(name: &str, table: &[(&str, &str)]) -> String {
    let lower = name.to_ascii_lowercase();
    let other = OTHER_NAMES.iter().find(|(other, ours)| {
        *other == lower && table.iter().any(|(known, _)| ours.starts_with(known))
    });
    let near = table
        .iter()
        .map(|(known, _)| (distance(&lower, known), *known))
        .min()
        .filter(|(distance, known)| *distance <= known.len() / 3);
    match (other, near) {
        (Some((_, ours)), _) => format!("did you mean `{ours}`?"),
        (None, Some((_, known))) => format!("did you mean `{known}`?"),
        (None, None) => {
            let known: Vec<String> = table.iter().map(|(known, _)| format!("`{known}`")).collect();
            format!("known are {}", known.join(", "))
        }
    }
}

/// A value as a message shows it: in backticks, cut, control and direction characters escaped.
pub fn shown(text: &str) -> String {
    let mut out = String::from("`");
    for (count, c) in text.chars().enumerate() {
        if count == SHOWN_CHARS {
            out.push('…');
            break;
        }
        match c {
            c if c.is_control() => out.extend(c.escape_default()),
            '\u{200e}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => {
                out.extend(c.escape_unicode());
            }
            c => out.push(c),
        }
    }
    out.push('`');
    out
}

/// Edits between two short names (Levenshtein); long ones are as far as can be.
fn distance(a: &str, b: &str) -> usize {
    if a.len() > 2 * SHOWN_CHARS {
        return usize::MAX;
    }
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut corner = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replaced = corner + usize::from(x != *y);
            corner = row[j + 1];
            row[j + 1] = replaced.min(corner + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}
