//! A source file as the rules see it: code without comments and literals, and comments without code.
//!
//! Both views keep every line where it stands, so a finding can name its line. The scanner knows
//! just enough of Rust and C++ for that; it does not parse.

use std::path::{Path, PathBuf};

/// What a file is written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Language {
    Rust,
    /// C, C++ and CUDA.
    Cpp,
    Toml,
    Markdown,
    Other,
}

/// One tracked file.
pub(crate) struct Source {
    pub(crate) path: PathBuf,
    pub(crate) language: Language,
    pub(crate) text: String,
    /// The text with comments and the insides of literals blanked out.
    pub(crate) code: String,
    /// The text with everything but comments blanked out.
    pub(crate) comments: String,
    /// Per line (from 0): whether it belongs to a test.
    pub(crate) in_test: Vec<bool>,
}

impl Source {
    pub(crate) fn new(path: &Path, text: String) -> Self {
        let language = language_of(path);
        let (code, comments) = match language {
            Language::Rust | Language::Cpp => split(&text, language),
            _ => (text.clone(), text.clone()),
        };
        let in_test = test_lines(path, language, &code);
        Self { path: path.to_owned(), language, text, code, comments, in_test }
    }

    /// Whether the path begins with `prefix`, component by component.
    pub(crate) fn is_under(&self, prefix: &str) -> bool {
        self.path.starts_with(prefix)
    }

    /// Functions as (name, first line from 0, number of lines).
    pub(crate) fn functions(&self) -> Vec<(String, usize, usize)> {
        match self.language {
            Language::Rust => rust_functions(&self.code),
            Language::Cpp => cpp_functions(&self.code),
            _ => Vec::new(),
        }
    }
}

fn language_of(path: &Path) -> Language {
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("rs") => Language::Rust,
        Some("h" | "cuh" | "cu" | "c" | "cpp") => Language::Cpp,
        Some("toml" | "lock") => Language::Toml,
        Some("md") => Language::Markdown,
        _ => Language::Other,
    }
}

/// Copies bytes to one of two views and blanks them in the other.
struct Splitter<'a> {
    text: &'a [u8],
    at: usize,
    code: Vec<u8>,
    comments: Vec<u8>,
}

fn split(text: &str, language: Language) -> (String, String) {
    let mut splitter = Splitter {
        text: text.as_bytes(),
        at: 0,
        code: Vec::with_capacity(text.len()),
        comments: Vec::with_capacity(text.len()),
    };
    while splitter.at < text.len() {
        splitter.step(language);
    }
    let view = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    (view(splitter.code), view(splitter.comments))
}

impl Splitter<'_> {
    fn step(&mut self, language: Language) {
        let rest = &self.text[self.at..];
        if rest.starts_with(b"//") {
            let len = rest.iter().position(|&byte| byte == b'\n').unwrap_or(rest.len());
            self.take_comment(len);
        } else if rest.starts_with(b"/*") {
            self.take_comment(block_comment_len(rest, language == Language::Rust));
        } else if let Some(len) = raw_string_len(rest, language) {
            self.take_literal(len);
        } else if rest[0] == b'"' {
            self.take_literal(quoted_len(rest, b'"'));
        } else if rest[0] == b'\'' && self.starts_char(language) {
            self.take_literal(quoted_len(rest, b'\''));
        } else {
            self.take_code(1);
        }
    }

    /// Tells a character literal from a Rust lifetime and from a C++ digit separator.
    fn starts_char(&self, language: Language) -> bool {
        let rest = &self.text[self.at + 1..];
        match language {
            Language::Rust => {
                rest.first() == Some(&b'\\')
                    || rest.iter().skip(1).take(4).any(|&byte| byte == b'\'')
                        && !rest[..rest.len().min(2)].iter().all(|byte| byte.is_ascii_alphanumeric())
            }
            _ => self.at == 0 || !self.text[self.at - 1].is_ascii_alphanumeric(),
        }
    }

    fn take_code(&mut self, len: usize) {
        self.take(len, true);
    }

    fn take_comment(&mut self, len: usize) {
        self.take(len, false);
    }

    /// The quotes are code; what stands between them is neither.
    fn take_literal(&mut self, len: usize) {
        let end = self.at + len;
        self.take(1, true);
        while self.at + 1 < end {
            let byte = self.text[self.at];
            self.code.push(blank(byte));
            self.comments.push(blank(byte));
            self.at += 1;
        }
        self.take(end - self.at, true);
    }

    fn take(&mut self, len: usize, is_code: bool) {
        for &byte in &self.text[self.at..self.at + len] {
            self.code.push(if is_code { byte } else { blank(byte) });
            self.comments.push(if is_code { blank(byte) } else { byte });
        }
        self.at += len;
    }
}

fn blank(byte: u8) -> u8 {
    if byte == b'\n' { b'\n' } else { b' ' }
}

/// Length of a block comment; Rust's nest.
fn block_comment_len(text: &[u8], nests: bool) -> usize {
    let (mut depth, mut at) = (0, 0);
    while at < text.len() {
        if text[at..].starts_with(b"/*") && (nests || depth == 0) {
            depth += 1;
            at += 2;
        } else if text[at..].starts_with(b"*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    text.len()
}

/// Length of a literal that begins and ends with `quote` and escapes with a backslash.
fn quoted_len(text: &[u8], quote: u8) -> usize {
    let mut at = 1;
    while at < text.len() {
        match text[at] {
            b'\\' => at += 2,
            byte if byte == quote => return at + 1,
            _ => at += 1,
        }
    }
    text.len()
}

/// Length of `r#"..."#` or `R"tag(...)tag"` at the start of `text`.
fn raw_string_len(text: &[u8], language: Language) -> Option<usize> {
    let (opening, closing) = match language {
        Language::Rust => {
            let hashes = text.strip_prefix(b"r")?.iter().take_while(|&&byte| byte == b'#').count();
            if text.get(1 + hashes) != Some(&b'"') {
                return None;
            }
            (2 + hashes, [b"\"".to_vec(), vec![b'#'; hashes]].concat())
        }
        _ => {
            let tag_len = text.strip_prefix(b"R\"")?.iter().position(|&byte| byte == b'(')?;
            let tag = &text[2..2 + tag_len];
            (3 + tag_len, [b")", tag, b"\""].concat())
        }
    };
    let end = text[opening..].windows(closing.len()).position(|window| window == closing);
    Some(end.map_or(text.len(), |end| opening + end + closing.len()))
}

/// Byte offset behind the brace that matches the first `{` at or after `from`.
pub(crate) fn block_end(code: &str, from: usize) -> Option<usize> {
    let mut depth = 0_usize;
    for (at, byte) in code.bytes().enumerate().skip(from) {
        match byte {
            b'{' => depth += 1,
            b'}' => {
                depth = depth.checked_sub(1)?;
                if depth == 0 {
                    return Some(at + 1);
                }
            }
            _ => {}
        }
    }
    None
}

/// Line (from 0) of a byte offset.
pub(crate) fn line_at(text: &str, offset: usize) -> usize {
    text.as_bytes()[..offset].iter().filter(|&&byte| byte == b'\n').count()
}

/// Marks lines of `#[cfg(test)]` items, and all lines of files that hold only tests, benches or examples.
fn test_lines(path: &Path, language: Language, code: &str) -> Vec<bool> {
    let num_lines = code.lines().count();
    let is_test = |part: &str| {
        matches!(part, "tests" | "benches" | "examples" | "tests.rs") || part.ends_with("_tests.rs")
    };
    if path.iter().filter_map(|part| part.to_str()).any(is_test) {
        return vec![true; num_lines];
    }
    let mut marked = vec![false; num_lines];
    if language != Language::Rust {
        return marked;
    }
    for (at, _) in code.match_indices("#[cfg(test)]") {
        // An item without a body ends at its semicolon: `mod tests;`, `use …;`.
        let item = &code[at..];
        let semicolon = item.find(';').unwrap_or(item.len());
        let brace = item.find('{').unwrap_or(item.len());
        let end = if semicolon < brace { at + semicolon } else { block_end(code, at).unwrap_or(code.len()) };
        let (first, last) = (line_at(code, at), line_at(code, end));
        for mark in marked.iter_mut().take(last + 1).skip(first) {
            *mark = true;
        }
    }
    marked
}

pub(crate) fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_'
}

/// Offsets of `word` where no letter, digit or underscore continues it on either side.
pub(crate) fn find_words<'a>(code: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    let first_is_word = word.bytes().next().is_some_and(is_word);
    let last_is_word = word.bytes().last().is_some_and(is_word);
    code.match_indices(word).map(|(at, _)| at).filter(move |&at| {
        let before = code.as_bytes()[..at].last().copied().is_some_and(is_word);
        let after = code.as_bytes().get(at + word.len()).copied().is_some_and(is_word);
        !(first_is_word && before || last_is_word && after)
    })
}

fn rust_functions(code: &str) -> Vec<(String, usize, usize)> {
    let mut functions = Vec::new();
    for at in find_words(code, "fn") {
        let name: String =
            code[at + 2..].trim_start().chars().take_while(|&c| c == '_' || c.is_alphanumeric()).collect();
        let rest = &code[at..];
        let brace = rest.find('{').unwrap_or(rest.len());
        // `[u8; 4]` in a signature is not the end of a declaration without a body.
        let end_of_declaration = declaration_end(rest).unwrap_or(rest.len());
        if name.is_empty() || end_of_declaration < brace {
            continue;
        }
        if let Some(end) = block_end(code, at) {
            let first = line_at(code, at);
            functions.push((name, first, line_at(code, end) - first + 1));
        }
    }
    functions
}

/// Offset of the first `;` outside brackets.
fn declaration_end(code: &str) -> Option<usize> {
    let mut depth = 0_i32;
    for (at, byte) in code.bytes().enumerate() {
        match byte {
            b'[' | b'(' => depth += 1,
            b']' | b')' => depth -= 1,
            b';' if depth == 0 => return Some(at),
            b'{' if depth == 0 => return None,
            _ => {}
        }
    }
    None
}

/// Blocks that follow a parameter list and do not belong to a statement or a lane region.
fn cpp_functions(code: &str) -> Vec<(String, usize, usize)> {
    let mut functions = Vec::new();
    for (brace, _) in code.match_indices('{') {
        let head = code[..brace].trim_end();
        let head = ["const", "noexcept", "override"]
            .iter()
            .fold(head, |head, word| head.strip_suffix(word).unwrap_or(head).trim_end());
        if !head.ends_with(')') {
            continue;
        }
        let Some(open) = matching_open(head) else {
            continue;
        };
        let before = head[..open].trim_end();
        let name: String = before.chars().rev().take_while(|&c| c == '_' || c.is_alphanumeric()).collect();
        let name: String = name.chars().rev().collect();
        let statement =
            matches!(name.as_str(), "" | "if" | "for" | "while" | "switch" | "catch" | "EACH_LANE");
        if statement {
            continue;
        }
        if let Some(end) = block_end(code, brace) {
            let first = line_at(code, brace);
            functions.push((name, first, line_at(code, end) - first + 1));
        }
    }
    functions
}

/// Offset of the parenthesis that the last byte of `head` closes.
fn matching_open(head: &str) -> Option<usize> {
    let mut depth = 0;
    for (at, byte) in head.bytes().enumerate().rev() {
        match byte {
            b')' => depth += 1,
            b'(' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(at);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rust(text: &str) -> Source {
        Source::new(Path::new("runtime/x.rs"), text.into())
    }

    fn cpp(text: &str) -> Source {
        Source::new(Path::new("kernels/src/x.cu"), text.into())
    }

    #[test]
    fn code_and_comments_are_told_apart() {
        let source = rust("let a = \"// no\"; // yes\n/* b /* c */ d */ let e = 'x';");
        assert_eq!(source.code, "let a = \"     \";       \n                  let e = ' ';");
        assert_eq!(source.comments.trim(), "// yes\n/* b /* c */ d */");
    }

    #[test]
    fn literals_of_all_kinds_are_blanked() {
        for text in ["r#\"a // \" b\"#", "\"a \\\" b\"", "'\\''", "b'\"'", "'\\u{1f600}'"] {
            let source = rust(&format!("{text}; end"));
            assert!(source.code.ends_with("; end"), "{text}: {}", source.code);
            assert!(!source.code.contains('a') && !source.code.contains("//"), "{text}: {}", source.code);
        }
        assert_eq!(
            rust("fn f<'a>(x: &'a u8, y: &'static str) {}").code,
            "fn f<'a>(x: &'a u8, y: &'static str) {}"
        );
        assert_eq!(cpp("R\"x(a)\" )x\"; 1'000'000 // c").code.trim_end(), "R         \"; 1'000'000");
    }

    #[test]
    fn test_items_are_marked() {
        let text = "fn a() {}\n#[cfg(test)]\nmod tests {\n  fn b() {}\n}\n\
                    fn c() {}\n#[cfg(test)]\nmod tests;\nfn d() {}";
        let source = rust(text);
        assert_eq!(source.in_test, [false, true, true, true, true, false, true, true, false]);
        let all = Source::new(Path::new("runtime/gpu/host/tests.rs"), "fn a() {}\n".into());
        assert_eq!(all.in_test, [true]);
    }

    #[test]
    fn functions_and_their_lengths_are_found() {
        let source = rust("trait T { fn a(x: [u8; 2]); }\nfn b(y: [u8; 4]) {\n  if true {\n  }\n}\n");
        assert_eq!(source.functions(), [("b".to_owned(), 1, 4)]);
        let source =
            cpp("template <class T> void f(int a) const {\n  if (a) {\n  }\n  EACH_LANE(l) {\n  }\n}\n");
        assert_eq!(source.functions(), [("f".to_owned(), 0, 6)]);
    }

    #[test]
    fn words_are_found_whole() {
        let found: Vec<usize> = find_words("unwrap unwrap_or my_unwrap .unwrap(", "unwrap").collect();
        assert_eq!(found, [0, 28]);
        let found: Vec<usize> = find_words("a.unwrap() b.unwrap_or()", ".unwrap(").collect();
        assert_eq!(found, [1]);
    }
}
