//! Names that look like the one that was typed.

/// The names within a few edits of `asked`, or that hold it or are held by it; nearest first, at most three.
pub(super) fn matches(asked: &str, names: &[String]) -> Vec<String> {
    let asked = asked.to_lowercase();
    if asked.is_empty() || asked.len() > 200 {
        return Vec::new();
    }
    let mut near: Vec<(usize, &String)> = names
        .iter()
        .filter_map(|name| {
            let lower = name.to_lowercase();
            let edits = distance(&asked, &lower);
            let holds = asked.len() >= 3 && (lower.contains(&asked) || asked.contains(&lower));
            (holds || edits <= 1 + asked.len() / 4).then_some((edits, name))
        })
        .collect();
    near.sort();
    near.into_iter().take(3).map(|(_, name)| name.clone()).collect()
}

/// Levenshtein distance in characters.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, left) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, &right) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(left != right);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances() {
        for (a, b, edits) in
            [("", "", 0), ("abc", "abc", 0), ("abc", "abd", 1), ("sdxl", "sd", 2), ("", "xy", 2)]
        {
            assert_eq!(distance(a, b), edits, "{a} {b}");
        }
    }
}
