//! The weights that A1111's prompts carry: `(word)`, `(word:1.3)`, `[word]`, `\(`, and `BREAK`.

/// What one more pair of round brackets multiplies a weight by; a square pair divides.
const STEP: f64 = 1.1;

/// A part of a prompt.
#[derive(Clone, Debug, PartialEq)]
pub enum Part {
    /// Text and its weight, 1 where nothing was said.
    Text(String, f64),
    /// From here on in a new chunk.
    Break,
}

/// A piece of the syntax.
enum Piece<'a> {
    Text(&'a str),
    RoundOpen,
    RoundClose,
    SquareOpen,
    SquareClose,
    /// `:1.3)`, which closes a round bracket with a weight of its own.
    Weight(f64),
}

/// The parts of `prompt`. Brackets without a partner count to the end, or as nothing.
pub fn parse(prompt: &str) -> Vec<Part> {
    let mut parts: Vec<Part> = Vec::new();
    let (mut round, mut square) = (Vec::new(), Vec::new());
    let mut rest = prompt;
    while let Some((piece, after)) = next(rest) {
        rest = after;
        match piece {
            Piece::RoundOpen => round.push(parts.len()),
            Piece::SquareOpen => square.push(parts.len()),
            Piece::Weight(factor) if !round.is_empty() => {
                multiply(&mut parts, round.pop(), factor);
            }
            Piece::RoundClose if !round.is_empty() => multiply(&mut parts, round.pop(), STEP),
            Piece::SquareClose if !square.is_empty() => {
                multiply(&mut parts, square.pop(), 1.0 / STEP);
            }
            Piece::RoundClose => parts.push(Part::Text(")".into(), 1.0)),
            Piece::SquareClose => parts.push(Part::Text("]".into(), 1.0)),
            Piece::Weight(_) => {
                let closed = prompt.len() - rest.len();
                let start = prompt[..closed].rfind(':').unwrap_or(closed);
                parts.push(Part::Text(prompt[start..closed].into(), 1.0));
            }
            Piece::Text(text) => push_text(&mut parts, text),
        }
    }
    for start in round {
        multiply(&mut parts, Some(start), STEP);
    }
    for start in square {
        multiply(&mut parts, Some(start), 1.0 / STEP);
    }
    merge(parts)
}

/// The first piece of `text` and what follows it.
fn next(text: &str) -> Option<(Piece<'_>, &str)> {
    let first = text.chars().next()?;
    let after = &text[first.len_utf8()..];
    let piece = match first {
        '(' => Piece::RoundOpen,
        ')' => Piece::RoundClose,
        '[' => Piece::SquareOpen,
        ']' => Piece::SquareClose,
        '\\' => {
            // Escapes what has a meaning, and is itself before anything else.
            return Some(match after.chars().next() {
                Some('(' | ')' | '[' | ']' | '\\') => (Piece::Text(&after[..1]), &after[1..]),
                _ => (Piece::Text(&text[..1]), after),
            });
        }
        ':' => {
            if let Some((number, after)) = after.split_once(')')
                && let Some(weight) = weight(number)
            {
                return Some((Piece::Weight(weight), after));
            }
            return Some((Piece::Text(&text[..1]), after));
        }
        _ => {
            let end = text.find(['(', ')', '[', ']', '\\', ':']).unwrap_or(text.len());
            return Some((Piece::Text(&text[..end]), &text[end..]));
        }
    };
    Some((piece, after))
}

/// `1.3`, `-.5`; nothing that only a programming language takes for a number.
fn weight(number: &str) -> Option<f64> {
    let number = number.trim();
    let plain = number.bytes().all(|byte| byte.is_ascii_digit() || b"+-.".contains(&byte));
    number.parse().ok().filter(|weight: &f64| plain && weight.is_finite())
}

fn multiply(parts: &mut [Part], start: Option<usize>, factor: f64) {
    for part in parts.iter_mut().skip(start.unwrap_or(usize::MAX)) {
        if let Part::Text(_, weight) = part {
            *weight *= factor;
        }
    }
}

/// Text up to each `BREAK` that stands alone as a word.
fn push_text(parts: &mut Vec<Part>, text: &str) {
    const BREAK: &str = "BREAK";
    let mut from = 0;
    for (at, _) in text.match_indices(BREAK) {
        let (before, after) = (&text[from..at], &text[at + BREAK.len()..]);
        let in_word = |next: Option<char>| next.is_some_and(|c| c.is_alphanumeric() || c == '_');
        if in_word(before.chars().next_back()) || in_word(after.chars().next()) {
            continue;
        }
        push_plain(parts, before.trim_end());
        parts.push(Part::Break);
        from = text.len() - after.trim_start().len();
    }
    push_plain(parts, &text[from.min(text.len())..]);
}

fn push_plain(parts: &mut Vec<Part>, text: &str) {
    if !text.is_empty() {
        parts.push(Part::Text(text.into(), 1.0));
    }
}

/// Neighbours of one weight become one text, so that words are cut as if no syntax had been there.
fn merge(parts: Vec<Part>) -> Vec<Part> {
    let mut merged: Vec<Part> = Vec::new();
    for part in parts {
        match (merged.last_mut(), part) {
            (Some(Part::Text(text, weight)), Part::Text(more, same)) if *weight == same => {
                text.push_str(&more);
            }
            (_, part) => merged.push(part),
        }
    }
    merged
}
