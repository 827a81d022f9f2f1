//! Reading the golden files.

use std::path::Path;

/// The lines of a golden file that are neither empty nor comments, with their numbers.
pub(super) fn lines(name: &str) -> Vec<(usize, String)> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(name);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let kept = |line: &&str| !line.trim().is_empty() && !line.starts_with('#');
    let numbered = text.lines().enumerate().filter(|(_, line)| kept(line));
    numbered.map(|(at, line)| (at + 1, line.to_owned())).collect()
}

/// The bytes of a hexadecimal string; spaces and line breaks separate nothing.
pub(super) fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.chars().filter_map(|c| c.to_digit(16)).map(|d| d as u8).collect();
    assert_eq!(digits.len() % 2, 0, "half a byte in {text:?}");
    digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()
}

/// The number in a string, hexadecimal if it begins with `0x`.
pub(super) fn number(text: &str) -> u64 {
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    parsed.unwrap_or_else(|_| panic!("{text:?} is not a number"))
}

/// The `key=value` in a line, as a number.
pub(super) fn value(line: &str, key: &str) -> u64 {
    let found = line.split(' ').find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
    number(found.unwrap_or_else(|| panic!("no {key} in {line:?}")))
}
