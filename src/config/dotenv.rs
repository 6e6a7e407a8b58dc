//! A small reader of `.env` files: only our lines are read, and those strictly.
//!
//! `.env` belongs to the project in the current folder, which may keep anything else there; a line that names no
//! variable of ours is none of our business.

/// A variable with its value and line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Line {
    pub(super) name: String,
    pub(super) value: String,
    pub(super) number: usize,
}

/// The lines whose variable is `ours`; `Err` holds the number of a line and what is wrong with it.
pub(super) fn read(
    text: &str,
    ours: impl Fn(&str) -> bool,
) -> Result<Vec<Line>, (usize, &'static str)> {
    let mut lines = Vec::new();
    for (index, line) in text.trim_start_matches('\u{feff}').lines().enumerate() {
        let line = line.trim();
        let line = line.strip_prefix("export ").map_or(line, str::trim_start);
        let Some((name, value)) = line.split_once('=') else { continue };
        let name = name.trim_end();
        if ours(name) {
            let number = index + 1;
            let value = unquote(value.trim()).map_err(|what| (number, what))?;
            lines.push(Line { name: name.to_owned(), value, number });
        }
    }
    Ok(lines)
}

/// The value as a shell would see it, less its expansions.
fn unquote(text: &str) -> Result<String, &'static str> {
    let (value, rest) = match text.chars().next() {
        Some('\'') => {
            let (value, rest) =
                text[1..].split_once('\'').ok_or("a single quote is not closed on its line")?;
            (value.to_owned(), rest)
        }
        Some('"') => double_quoted(&text[1..])?,
        _ => {
            let end = text.find(" #").or_else(|| text.starts_with('#').then_some(0));
            (text[..end.unwrap_or(text.len())].trim_end().to_owned(), "")
        }
    };
    let rest = rest.trim_start();
    if rest.is_empty() || rest.starts_with('#') {
        Ok(value)
    } else {
        Err("there is text after the closing quote")
    }
}

/// The value up to the closing quote, and what follows it.
fn double_quoted(text: &str) -> Result<(String, &str), &'static str> {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Ok((value, &text[at + 1..])),
            '\\' => match chars.next().map(|(_, c)| c) {
                Some('n') => value.push('\n'),
                Some('t') => value.push('\t'),
                Some(c @ ('"' | '\\' | '$' | '`')) => value.push(c),
                _ => return Err("there is an unknown escape"),
            },
            c => value.push(c),
        }
    }
    Err("a double quote is not closed on its line")
}
