//! Lengths, names and tags.

use std::collections::{BTreeMap, BTreeSet};

use super::Finding;
use super::source::{Language, Source, is_word, line_at};

/// Columns of a line of code.
const LINE_LEN_MAX: usize = 120;
/// Lines of a file.
const FILE_LINES_MAX: usize = 900;
/// Lines of a function, signature and braces included.
const FUNCTION_LINES_MAX: usize = 120;
/// Lines above an `unsafe` in which its reason may stand.
const SAFETY_LINES: usize = 6;
/// Machine-written files, and bytes that others produced: their shape is not ours.
const GENERATED: &[&str] = &[
    "ffi/mlx5dv-sys/src/bindings.rs",
    "runtime/metadata/src/etcd/generated.rs",
    "runtime/metadata/src/grpc/generated.rs",
    "runtime/metadata/src/grpc/express/generated.rs",
    "runtime/metadata/tests/generated",
    "tests/golden",
];
/// Endings that say when something was written instead of what it is.
const STALE_ENDINGS: &[&str] = &["_v2", "_v3", "_new", "_old", "_tmp", "_final"];
/// Names that end like that for a reason.
const NAMES_WITH_REASON: &[&str] = &["is_new"];
/// Where the numbered edges are described.
const ORDERING: &str = "kernels/ORDERING.md";

/// Lengths, names and unsafe reasons of one file.
pub(crate) fn check(source: &Source, findings: &mut Vec<Finding>) {
    if GENERATED.iter().any(|path| source.is_under(path)) {
        return;
    }
    lengths(source, findings);
    names(source, findings);
    reasons(source, findings);
}

fn lengths(source: &Source, findings: &mut Vec<Finding>) {
    if !matches!(source.language, Language::Rust | Language::Cpp) {
        return;
    }
    for (line, text) in source.text.lines().enumerate() {
        let len = text.chars().count();
        if len > LINE_LEN_MAX {
            let what = format!("the line has {len} columns, the limit is {LINE_LEN_MAX}");
            findings.push(Finding::at(source, line, what));
        }
    }
    let num_lines = source.text.lines().count();
    if num_lines > FILE_LINES_MAX {
        let what = format!("the file has {num_lines} lines, the limit is {FILE_LINES_MAX}");
        findings.push(Finding::at(source, 0, what));
    }
    for (name, line, num_lines) in source.functions() {
        if num_lines > FUNCTION_LINES_MAX {
            let what = format!("function {name} has {num_lines} lines, the limit is {FUNCTION_LINES_MAX}");
            findings.push(Finding::at(source, line, what));
        }
    }
}

fn names(source: &Source, findings: &mut Vec<Finding>) {
    let is_stale = |name: &str| {
        STALE_ENDINGS.iter().any(|ending| name.ends_with(ending)) && !NAMES_WITH_REASON.contains(&name)
    };
    let stem = source.path.file_stem().unwrap_or_default();
    if is_stale(&stem.to_string_lossy()) {
        findings.push(Finding::at(source, 0, "name the file after what it is, not when".into()));
    }
    if !matches!(source.language, Language::Rust | Language::Cpp) {
        return;
    }
    for (line, text) in source.code.lines().enumerate() {
        for name in text.split(|c: char| !c.is_ascii() || !is_word(c as u8)) {
            if is_stale(name) {
                let what = format!("`{name}`: name it after what it is, not after when it came");
                findings.push(Finding::at(source, line, what));
            }
        }
    }
}

/// `unsafe` blocks and impls say why they hold; lint exceptions say why they stand.
fn reasons(source: &Source, findings: &mut Vec<Finding>) {
    if source.language != Language::Rust {
        return;
    }
    let comments: Vec<&str> = source.comments.lines().collect();
    for (line, text) in source.code.lines().enumerate() {
        let opens = text.contains("unsafe {") || text.contains("unsafe impl");
        let above = &comments[line.saturating_sub(SAFETY_LINES)..=line];
        if opens && !above.iter().any(|comment| comment.contains("SAFETY:")) {
            let what = "unsafe without a SAFETY: comment above it".into();
            findings.push(Finding::at(source, line, what));
        }
    }
    for attribute in ["#[allow(", "#![allow(", "#[expect(", "#![expect("] {
        for (at, _) in source.code.match_indices(attribute) {
            let end = source.code[at..].find(']').map_or(source.code.len(), |end| at + end);
            if !source.code[at..end].contains("reason") {
                let what = format!("`{attribute}…)]` without a reason");
                findings.push(Finding::at(source, line_at(&source.code, at), what));
            }
        }
    }
}

/// Both ends of every numbered edge stand in code, and every edge has a row in the table.
pub(crate) fn check_ordering(sources: &[Source], findings: &mut Vec<Finding>) {
    let Some(table) = sources.iter().find(|source| source.is_under(ORDERING)) else {
        let what = "is missing: edges are numbered there, and checked against it".to_owned();
        findings.push(Finding { path: ORDERING.into(), line: 0, what });
        return;
    };
    let rows = table_rows(&table.text);
    let mut places: BTreeMap<u32, BTreeSet<(usize, usize)>> = BTreeMap::new();
    for (file, source) in sources.iter().enumerate() {
        if !matches!(source.language, Language::Rust | Language::Cpp) || source.is_under("tests/tidy") {
            continue;
        }
        for (line, text) in source.comments.lines().enumerate() {
            for number in order_tags(text) {
                places.entry(number).or_default().insert((file, line));
                if !rows.contains(&number) {
                    let what = format!("ORDER({number}) has no row in {ORDERING}");
                    findings.push(Finding::at(source, line, what));
                }
            }
        }
    }
    for number in rows {
        let num_places = places.get(&number).map_or(0, BTreeSet::len);
        if num_places < 2 {
            let what = format!(
                "edge {number} is cited as ORDER({number}) in {num_places} places, both its ends must cite it"
            );
            findings.push(Finding::at(table, 0, what));
        }
    }
}

/// Numbers in the first cell of table rows.
fn table_rows(text: &str) -> BTreeSet<u32> {
    let first_cell = |line: &str| line.strip_prefix('|')?.split('|').next()?.trim().parse().ok();
    text.lines().filter_map(first_cell).collect()
}

fn order_tags(text: &str) -> impl Iterator<Item = u32> + '_ {
    text.match_indices("ORDER(").filter_map(|(at, tag)| {
        let rest = &text[at + tag.len()..];
        rest[..rest.find(')')?].parse().ok()
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn source(path: &str, text: &str) -> Source {
        Source::new(Path::new(path), text.into())
    }

    fn check_one(path: &str, text: &str) -> Vec<String> {
        let mut findings = Vec::new();
        check(&source(path, text), &mut findings);
        findings.into_iter().map(|finding| finding.what).collect()
    }

    #[test]
    fn lengths_are_limited() {
        let long_line = format!("// {}\n", "x".repeat(LINE_LEN_MAX));
        assert_eq!(check_one("runtime/a.rs", &long_line), ["the line has 123 columns, the limit is 120"]);
        assert_eq!(check_one("tests/golden/a.rs", &long_line), [] as [&str; 0]);
        let long_file = "//\n".repeat(FILE_LINES_MAX + 1);
        assert_eq!(check_one("a.h", &long_file), ["the file has 901 lines, the limit is 900"]);
        let body = "a();\n".repeat(FUNCTION_LINES_MAX - 1);
        let long_function = format!("fn f() {{\n{body}}}\n");
        assert_eq!(check_one("runtime/a.rs", &long_function), ["function f has 121 lines, the limit is 120"]);
        let long_kernel = format!("void f(int a) {{\n{body}}}\n");
        assert_eq!(check_one("a.cu", &long_kernel).len(), 1);
    }

    #[test]
    fn names_say_what_and_not_when() {
        assert_eq!(check_one("runtime/wqe_v2.rs", "").len(), 1);
        assert_eq!(check_one("runtime/a.rs", "fn post_new(a: u8) {}").len(), 1);
        assert_eq!(check_one("runtime/a.rs", "fn is_new() {} // post_new"), [] as [&str; 0]);
    }

    #[test]
    fn unsafe_and_exceptions_need_reasons() {
        assert_eq!(check_one("runtime/a.rs", "fn a() { unsafe { b() } }").len(), 1);
        assert_eq!(check_one("runtime/a.rs", "// SAFETY: c.\nfn a() { unsafe { b() } }"), [] as [&str; 0]);
        assert_eq!(check_one("runtime/a.rs", "unsafe impl Send for A {}").len(), 1);
        assert_eq!(check_one("runtime/a.rs", "#[allow(dead_code)]\nfn a() {}").len(), 1);
        let with_reason = "#[expect(\n dead_code,\n reason = \"b\"\n)]\nfn a() {}";
        assert_eq!(check_one("runtime/a.rs", with_reason), [] as [&str; 0]);
    }

    #[test]
    fn both_ends_of_an_edge_and_its_row_are_needed() {
        let check = |table: &str, code: &str| {
            let mut findings = Vec::new();
            check_ordering(&[source(ORDERING, table), source("runtime/a.rs", code)], &mut findings);
            findings.len()
        };
        assert_eq!(check("| 1 | a |\n", "// ORDER(1): b\n// ORDER(1): c\n"), 0);
        assert_eq!(check("| 1 | a |\n", "// ORDER(1): b\n"), 1, "one end is missing");
        assert_eq!(check("| 1 | a |\n", "let a = \"ORDER(1)\"; // ORDER(1)\n"), 1, "a string is no end");
        assert_eq!(check("| a | b |\n", "// ORDER(1): b\n// ORDER(1): c\n"), 2, "the row is missing");
        let mut findings = Vec::new();
        check_ordering(&[source("runtime/a.rs", "// ORDER(1): b\n// ORDER(1): c\n")], &mut findings);
        assert_eq!(findings.len(), 1, "the table is missing");
    }
}
