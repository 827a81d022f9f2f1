//! Who may import whom: the arrows between rooms.
//!
//! Crates make most arrows impossible to break; this looks at what crates cannot see, and at the
//! crates' own lists of dependencies, so that a new arrow is a decision and not an accident.

use std::path::Path;

use super::Finding;
use super::source::{Language, Source, find_words, is_word, line_at};

/// One crate and the workspace crates it may use.
struct CrateRule {
    dir: &'static str,
    name: &'static str,
    may_use: &'static [&'static str],
}

/// Leaves first; the root package last, since its directory holds the others.
const CRATES: &[CrateRule] = &[
    CrateRule { dir: "memheap", name: "ibex-memheap", may_use: &[] },
    CrateRule { dir: "runtime/abi", name: "ibex-abi", may_use: &[] },
    CrateRule { dir: "runtime/roce", name: "ibex-roce", may_use: &[] },
    CrateRule { dir: "runtime/metadata", name: "ibex-metadata", may_use: &[] },
    CrateRule { dir: "ffi/mlx5dv-sys", name: "ibex-mlx5dv-sys", may_use: &[] },
    CrateRule { dir: "ffi/nccl-rs", name: "ibex-nccl", may_use: &[] },
    CrateRule {
        dir: "runtime/hca",
        name: "ibex-hca",
        may_use: &["ibex-abi", "ibex-roce", "ibex-memheap", "ibex-mlx5dv-sys"],
    },
    CrateRule { dir: "ffi/preload", name: "ibex-preload", may_use: &["ibex", "ibex-abi", "ibex-hca"] },
    CrateRule { dir: "ffi/c", name: "ibex-c", may_use: &["ibex"] },
    CrateRule { dir: "ffi/python", name: "ibex-python", may_use: &["ibex"] },
    CrateRule { dir: "tests/consumer", name: "ibex-consumer", may_use: &["ibex"] },
    CrateRule {
        dir: "tests/fuzz",
        name: "ibex-fuzz",
        may_use: &["ibex", "ibex-hca", "ibex-metadata", "ibex-roce"],
    },
    CrateRule {
        dir: "",
        name: "ibex",
        may_use: &["ibex-abi", "ibex-hca", "ibex-memheap", "ibex-metadata", "ibex-nccl"],
    },
];

/// Modules of one crate that may name only these other modules of it.
struct RoomRule {
    /// Files and directories of the room.
    paths: &'static [&'static str],
    /// `crate::…` names it may use.
    may_use: &'static [&'static str],
}

/// The pure rooms of the root package stand below everything else in it.
const ROOMS: &[RoomRule] = &[
    RoomRule { paths: &["runtime/ids.rs"], may_use: &[] },
    RoomRule { paths: &["runtime/config.rs", "runtime/config"], may_use: &["ids", "error"] },
    RoomRule { paths: &["runtime/layout.rs", "runtime/layout"], may_use: &["ids", "error", "config"] },
    RoomRule {
        paths: &["runtime/membership.rs", "runtime/membership"],
        may_use: &["membership", "ids", "error", "config", "layout"],
    },
    RoomRule { paths: &["runtime/placement.rs"], may_use: &["ids", "error", "config", "membership"] },
    RoomRule { paths: &["runtime/time.rs"], may_use: &[] },
    RoomRule { paths: &["runtime/gpu"], may_use: &["gpu", "time", "ids"] },
    RoomRule {
        paths: &["runtime/reference"],
        may_use: &["reference", "ids", "error", "config", "layout", "membership", "placement"],
    },
];

/// The rule of the crate that a file belongs to.
fn crate_of(path: &Path) -> &'static CrateRule {
    let owner = CRATES.iter().find(|rule| path.starts_with(rule.dir));
    owner.expect("the root package holds every path")
}

/// Checks one Rust file or manifest.
pub(crate) fn check(source: &Source, findings: &mut Vec<Finding>) {
    if source.path.file_name().is_some_and(|name| name == "Cargo.toml") {
        manifest(source, findings);
    }
    if source.language == Language::Rust {
        crates(source, findings);
        rooms(source, findings);
    }
}

/// Workspace crates in the dependency tables of a manifest.
fn manifest(source: &Source, findings: &mut Vec<Finding>) {
    let rule = crate_of(&source.path);
    let mut section = "";
    for (line, text) in source.text.lines().enumerate() {
        if let Some(header) = text.trim().strip_prefix('[') {
            section = header.trim_end_matches(']');
            continue;
        }
        // The workspace's table says where crates are, not who uses them; tests may use what they
        // compare with.
        if !section.ends_with("dependencies")
            || section == "workspace.dependencies"
            || section == "dev-dependencies"
        {
            continue;
        }
        let name = text.split(['.', '=', ' ']).next().unwrap_or_default();
        let is_ours = name == "ibex" || name.starts_with("ibex-");
        if is_ours && !rule.may_use.contains(&name) {
            let what = format!("{} may not depend on {name}", rule.name);
            findings.push(Finding::at(source, line, what));
        }
    }
}

/// Workspace crates named in code.
fn crates(source: &Source, findings: &mut Vec<Finding>) {
    let rule = crate_of(&source.path);
    for (at, _) in source.code.match_indices("ibex_") {
        let starts_word = at == 0 || !is_word(source.code.as_bytes()[at - 1]);
        let name: String =
            source.code[at..].chars().take_while(|&c| c == '_' || c.is_alphanumeric()).collect();
        let is_path = source.code[at + name.len()..].starts_with("::");
        let line = line_at(&source.code, at);
        let name = name.replace('_', "-");
        let known = CRATES.iter().any(|other| other.name == name);
        let allowed = name == rule.name || rule.may_use.contains(&name.as_str()) || source.in_test[line];
        if starts_word && is_path && known && !allowed {
            findings.push(Finding::at(source, line, format!("{} may not use {name}", rule.name)));
        }
    }
}

/// `crate::…` paths that leave a room in a direction that has no arrow.
fn rooms(source: &Source, findings: &mut Vec<Finding>) {
    let is_in = |rule: &&RoomRule| rule.paths.iter().any(|path| source.is_under(path));
    let Some(rule) = ROOMS.iter().find(is_in) else {
        return;
    };
    for at in find_words(&source.code, "crate::") {
        let line = line_at(&source.code, at);
        if source.in_test[line] {
            continue;
        }
        for room in first_names(&source.code[at + "crate::".len()..]) {
            if !rule.may_use.contains(&room.as_str()) {
                let what = format!("this room may not use crate::{room}; it may use {:?}", rule.may_use);
                findings.push(Finding::at(source, line, what));
            }
        }
    }
}

/// The names that follow `crate::`: one, or those of a braced list.
fn first_names(rest: &str) -> Vec<String> {
    let name = |text: &str| -> String {
        text.trim_start().chars().take_while(|&c| c == '_' || c.is_alphanumeric()).collect()
    };
    let Some(list) = rest.strip_prefix('{') else {
        return vec![name(rest)];
    };
    let mut depth = 0;
    let mut names = vec![name(list)];
    for (at, c) in list.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => names.push(name(&list[at + 1..])),
            _ => {}
        }
    }
    names.retain(|name| !name.is_empty());
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_one(path: &str, text: &str) -> Vec<String> {
        let mut findings = Vec::new();
        check(&Source::new(Path::new(path), text.into()), &mut findings);
        findings.into_iter().map(|finding| finding.what).collect()
    }

    #[test]
    fn a_manifest_with_a_wrong_arrow_is_found() {
        let bad = "[dependencies]\nibex-hca.workspace = true\n";
        assert_eq!(check_one("runtime/abi/Cargo.toml", bad), ["ibex-abi may not depend on ibex-hca"]);
        assert_eq!(check_one("Cargo.toml", bad), [] as [&str; 0]);
        let target = "[target.'cfg(unix)'.dependencies]\nibex = { path = \"..\" }\n";
        assert_eq!(check_one("runtime/hca/Cargo.toml", target).len(), 1);
        let harmless = "[dev-dependencies]\nibex-abi.workspace = true\n\
                        [workspace.dependencies]\nibex = \"1\"\n";
        assert_eq!(check_one("ffi/mlx5dv-sys/Cargo.toml", harmless), [] as [&str; 0]);
    }

    #[test]
    fn code_that_names_a_crate_it_may_not_use_is_found() {
        let bad = "use ibex_hca::Hca;\n";
        assert_eq!(check_one("runtime/abi/src/lib.rs", bad), ["ibex-abi may not use ibex-hca"]);
        assert_eq!(check_one("runtime/session.rs", bad), [] as [&str; 0]);
        assert_eq!(
            check_one("runtime/hca/src/lib.rs", "fn ibex_pool_create() { ibex_abi::wqe(); }"),
            [] as [&str; 0]
        );
        assert_eq!(check_one("runtime/abi/src/lib.rs", "// use ibex_hca::Hca;\n"), [] as [&str; 0]);
    }

    #[test]
    fn a_room_that_reaches_upwards_is_found() {
        assert_eq!(check_one("runtime/layout.rs", "use crate::session::Session;\n").len(), 1);
        assert_eq!(check_one("runtime/layout.rs", "use crate::{ids::{Rank, Epoch}, gpu::Gpu};\n").len(), 1);
        assert_eq!(check_one("runtime/layout.rs", "use crate::config::Config;\n"), [] as [&str; 0]);
        assert_eq!(check_one("runtime/gpu/host.rs", "fn a() { crate::session::b() }").len(), 1);
        assert_eq!(check_one("runtime/session.rs", "use crate::gpu::Gpu;\n"), [] as [&str; 0]);
    }
}
