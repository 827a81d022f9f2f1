//! What we stand on: where packages come from, and under which terms.

use std::path::Path;

use super::Finding;
use super::source::Source;

const REGISTRY: &str = "registry+https://github.com/rust-lang/crates.io-index";

/// Terms that MIT OR Apache-2.0 code may stand on.
const LICENCES: &[&str] = &[
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "ISC",
    "MIT",
    "MIT-0",
    "MPL-2.0",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

/// Every package of a lock file is ours or comes from crates.io with a checksum.
pub(crate) fn check_lock(source: &Source, findings: &mut Vec<Finding>) {
    let mut line = 0;
    for package in source.text.split("[[package]]") {
        let value = |key: &str| {
            let prefix = format!("{key} = \"");
            let line = package.lines().find_map(|line| line.strip_prefix(&prefix))?;
            line.strip_suffix('"')
        };
        if let Some(name) = value("name") {
            let is_ours = name == "ibex" || name.starts_with("ibex-");
            let wrong = match value("source") {
                None if !is_ours => Some("comes from a path outside the workspace"),
                Some(REGISTRY) if value("checksum").is_none() => Some("has no checksum"),
                Some(REGISTRY) | None => None,
                Some(_) => Some("does not come from crates.io"),
            };
            if let Some(wrong) = wrong {
                findings.push(Finding::at(source, line, format!("package {name} {wrong}")));
            }
        }
        line += package.matches('\n').count();
    }
}

/// Licences in the answer of `cargo metadata`.
pub(crate) fn check_licences(metadata: &serde_json::Value, findings: &mut Vec<Finding>) {
    let packages = metadata["packages"].as_array();
    for package in packages.into_iter().flatten() {
        let licence = package["license"].as_str().unwrap_or("none stated");
        if !is_allowed(licence) {
            findings.push(Finding {
                path: Path::new("Cargo.lock").to_owned(),
                line: 0,
                what: format!("package {} has licence `{licence}`", package["name"]),
            });
        }
    }
}

/// Whether an SPDX expression can be satisfied with listed licences. `A/B` is an old spelling of `A OR B`.
fn is_allowed(expression: &str) -> bool {
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut at = 0;
    either(&words, &mut at) && at == words.len()
}

fn either(words: &[&str], at: &mut usize) -> bool {
    let mut allowed = both(words, at);
    while words.get(*at) == Some(&"OR") {
        *at += 1;
        allowed |= both(words, at);
    }
    allowed
}

fn both(words: &[&str], at: &mut usize) -> bool {
    let mut allowed = term(words, at);
    while words.get(*at) == Some(&"AND") {
        *at += 1;
        allowed &= term(words, at);
    }
    allowed
}

fn term(words: &[&str], at: &mut usize) -> bool {
    let Some(&word) = words.get(*at) else {
        return false;
    };
    *at += 1;
    if word == "(" {
        let allowed = either(words, at);
        *at += 1;
        return allowed;
    }
    if words.get(*at) == Some(&"WITH") {
        let exception = words.get(*at + 1).unwrap_or(&"");
        *at += 2;
        return LICENCES.contains(&format!("{word} WITH {exception}").as_str());
    }
    LICENCES.contains(&word)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lock_findings(text: &str) -> usize {
        let mut findings = Vec::new();
        check_lock(&Source::new(Path::new("Cargo.lock"), text.into()), &mut findings);
        findings.len()
    }

    #[test]
    fn packages_from_elsewhere_are_found() {
        let package =
            |rest: &str| format!("version = 4\n\n[[package]]\nname = \"a\"\nversion = \"1\"\n{rest}");
        let registry = format!("source = \"{REGISTRY}\"\n");
        assert_eq!(lock_findings(&package(&format!("{registry}checksum = \"1\"\n"))), 0);
        assert_eq!(lock_findings(&package(&registry)), 1, "no checksum");
        assert_eq!(lock_findings(&package("")), 1, "a path");
        assert_eq!(lock_findings(&package("source = \"git+https://example.invalid/a\"\n")), 1);
        assert_eq!(lock_findings("[[package]]\nname = \"ibex-abi\"\nversion = \"1\"\n"), 0);
    }

    #[test]
    fn licence_expressions_are_understood() {
        for good in [
            "MIT",
            "MIT OR GPL-3.0",
            "MIT/Apache-2.0",
            "(MIT OR Apache-2.0) AND Unicode-3.0",
            "Apache-2.0 WITH LLVM-exception OR GPL-2.0",
        ] {
            assert!(is_allowed(good), "{good}");
        }
        for bad in
            ["GPL-3.0", "MIT AND GPL-3.0", "GPL-2.0 WITH LLVM-exception", "none stated", "", "MIT GPL-3.0"]
        {
            assert!(!is_allowed(bad), "{bad}");
        }
    }

    #[test]
    fn a_package_without_a_listed_licence_is_found() {
        let metadata = serde_json::json!({"packages": [
            {"name": "a", "license": "MIT"},
            {"name": "b", "license": "AGPL-3.0"},
            {"name": "c", "license": null},
        ]});
        let mut findings = Vec::new();
        check_licences(&metadata, &mut findings);
        assert_eq!(findings.len(), 2);
    }
}
