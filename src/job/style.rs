//! Style presets: words put round the prompt, and words for the negative prompt.
//!
//! Templates are short suffixes: text encoders read 77 tokens and cut the end, and small models know few words.
//! A prompt in Chinese gets a Chinese suffix, so that one text does not mix two languages.

use super::ValidJob;

/// A preset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Style {
    /// What a client writes in `style`.
    pub name: &'static str,
    /// The prompt with the style; `{prompt}` stands for what the client wrote.
    pub template: &'static str,
    /// The same for a Chinese prompt.
    pub template_zh: &'static str,
    /// What the style avoids; empty for nothing.
    pub negative: &'static str,
}

/// The texts the encoder gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompts {
    /// What to show.
    pub prompt: String,
    /// What to avoid; empty for nothing.
    pub negative: String,
}

/// Where a template takes the client's words.
const SLOT: &str = "{prompt}";

const STYLES: &[Style] = &[
    // The default avoids nothing, so that a seed gives what other tools give for the same text.
    style("realistic", "{prompt}, realistic", "{prompt}，写实风格", ""),
    style(
        "cinematic",
        "{prompt}, cinematic film still, dramatic light",
        "{prompt}，电影画面，戏剧光影",
        "cartoon, drawing, flat light",
    ),
    style("anime", "{prompt}, anime", "{prompt}，动漫风格", "photo, 3d render"),
    style(
        "watercolor",
        "{prompt}, watercolor painting, soft washes",
        "{prompt}，水彩画",
        "photo, 3d render",
    ),
    style("3d", "{prompt}, 3d render", "{prompt}，三维渲染", "photo, drawing, sketch"),
    style(
        "pixel-art",
        "{prompt}, pixel art, low resolution sprite",
        "{prompt}，像素风格",
        "photo, blurry, smooth shading",
    ),
    style(
        "oil-painting",
        "{prompt}, oil painting, visible brush strokes",
        "{prompt}，油画风格",
        "photo, 3d render",
    ),
    style("sketch", "{prompt}, pencil sketch", "{prompt}，铅笔素描", "photo, colour"),
    style(
        "fantasy",
        "{prompt}, fantasy illustration, magical light",
        "{prompt}，奇幻插画",
        "photo, modern",
    ),
    style("none", SLOT, SLOT, ""),
];

const fn style(
    name: &'static str,
    template: &'static str,
    template_zh: &'static str,
    negative: &'static str,
) -> Style {
    Style { name, template, template_zh, negative }
}

/// Every preset, the default first.
pub fn all() -> &'static [Style] {
    STYLES
}

/// The preset of that name.
pub fn find(name: &str) -> Option<&'static Style> {
    STYLES.iter().find(|style| style.name == name)
}

/// The texts of a job: its style's template filled, its own negative prompt before the style's.
pub fn apply(job: &ValidJob) -> Prompts {
    let style = find(&job.style).unwrap_or(&STYLES[STYLES.len() - 1]);
    let template = if is_chinese(&job.prompt) { style.template_zh } else { style.template };
    let prompt = if template == SLOT {
        job.prompt.clone()
    } else {
        // "a cat." and ", realistic" should not meet as "a cat., realistic".
        let bare =
            job.prompt.trim_end_matches(|c: char| c.is_whitespace() || ".,;。，；、".contains(c));
        template.replacen(SLOT, if bare.is_empty() { &job.prompt } else { bare }, 1)
    };
    let own = job.negative_prompt.as_deref().unwrap_or_default().trim();
    let negative: Vec<&str> =
        [own, style.negative].into_iter().filter(|text| !text.is_empty()).collect();
    Prompts { prompt, negative: negative.join(", ") }
}

/// Chinese characters and no Japanese kana.
fn is_chinese(text: &str) -> bool {
    let kana = |c| matches!(c, '\u{3040}'..='\u{30ff}');
    let han = |c| matches!(c, '\u{3400}'..='\u{4dbf}' | '\u{4e00}'..='\u{9fff}');
    text.contains(han) && !text.contains(kana)
}
