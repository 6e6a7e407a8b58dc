//! The weights of a prompt, as A1111 reads them.

use genvideo::engine::prompt::attention::{Part, parse};

#[test]
fn weights_are_read_as_a1111_reads_them() {
    let up = 1.1;
    let cases: &[(&str, &[(&str, f64)])] = &[
        ("a cat", &[("a cat", 1.0)]),
        ("an (important) word", &[("an ", 1.0), ("important", up), (" word", 1.0)]),
        ("(unbalanced", &[("unbalanced", up)]),
        (r"\(literal\]", &[("(literal]", 1.0)]),
        ("(unnecessary)(parens)", &[("unnecessaryparens", up)]),
        ("a (cat:1.3)", &[("a ", 1.0), ("cat", 1.3)]),
        ("[[cat]]", &[("cat", 1.0 / up / up)]),
        ("((cat))", &[("cat", up * up)]),
        ("(a (b:2) c:0.5)", &[("a ", 0.5), ("b", 1.0), (" c", 0.5)]),
        ("(cat: -.5 )", &[("cat", -0.5)]),
        ("time 10:30 (x)", &[("time 10:30 ", 1.0), ("x", up)]),
        ("a) b]", &[("a) b]", 1.0)]),
        ("x:1.3) y", &[("x:1.3) y", 1.0)]),
        ("(a:inf)", &[("a:inf", up)]),
        (r"C:\dir \\ \(", &[(r"C:\dir \ (", 1.0)]),
        ("()", &[]),
        ("", &[]),
        ("(猫:1.2)", &[("猫", 1.2)]),
    ];
    for (prompt, wanted) in cases {
        let parts = parse(prompt);
        let got: Vec<(&str, f64)> = parts
            .iter()
            .map(|part| match part {
                Part::Text(text, weight) => (text.as_str(), *weight),
                Part::Break => panic!("{prompt}: a break"),
            })
            .collect();
        assert_eq!(got.len(), wanted.len(), "{prompt}: {got:?}");
        for ((text, weight), (wanted_text, wanted_weight)) in got.iter().zip(*wanted) {
            assert_eq!(text, wanted_text, "{prompt}");
            assert!((weight - wanted_weight).abs() < 1e-12, "{prompt}: {weight}");
        }
    }
}

#[test]
fn a_break_is_a_word_of_its_own() {
    let text = |text: &str| Part::Text(text.into(), 1.0);
    for (prompt, wanted) in [
        ("a BREAK b", vec![text("a"), Part::Break, text("b")]),
        ("BREAK", vec![Part::Break]),
        ("aBREAK BREAKFAST break", vec![text("aBREAK BREAKFAST break")]),
        ("BREAKFAST BREAK b", vec![text("BREAKFAST"), Part::Break, text("b")]),
        ("aBREAK BREAK", vec![text("aBREAK"), Part::Break]),
    ] {
        assert_eq!(parse(prompt), wanted, "{prompt}");
    }
}

#[test]
fn no_prompt_of_brackets_breaks_the_reader() {
    let mut state = 1_u32;
    for _ in 0..2000 {
        let prompt: String = (0..12)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                ['(', ')', '[', ']', '\\', ':', '1', '.', 'a', 'é', ' ', '猫']
                    [state as usize / (1 << 24) % 12]
            })
            .collect();
        for part in parse(&prompt) {
            assert!(matches!(part, Part::Text(_, weight) if weight.is_finite()), "{prompt}");
        }
    }
}
