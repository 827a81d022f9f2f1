//! What must not be written, where, and what to write instead: one table.

use super::Finding;
use super::source::{Language, Source, find_words, line_at};

/// Which part of which files a ban looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scope {
    /// Rust code outside tests.
    ShippedRust,
    /// Rust code, tests included.
    Rust,
    /// Kernel sources: C++ under `kernels/src` and `kernels/include`.
    Kernels,
    /// Every byte of every text file.
    AnyText,
}

/// One thing that is not written here.
pub(crate) struct Ban {
    /// Found as a whole word where it begins or ends with a letter.
    pub(crate) needle: &'static str,
    pub(crate) scope: Scope,
    /// Only below these paths; empty: everywhere.
    pub(crate) only: &'static [&'static str],
    /// Not in these files and directories.
    pub(crate) except: &'static [&'static str],
    /// What to do instead, or why not.
    pub(crate) instead: &'static str,
}

/// Rooms that name no clock, socket, thread, file or environment.
const PURE: &[&str] = &[
    "memheap/src",
    "runtime/abi/src",
    "runtime/roce/src",
    "runtime/ids.rs",
    "runtime/layout.rs",
    "runtime/config.rs",
    "runtime/placement.rs",
    "runtime/membership.rs",
    "runtime/membership",
    "runtime/metadata/src/backoff.rs",
    "runtime/metadata/src/change.rs",
    "runtime/metadata/src/derived.rs",
    "runtime/metadata/src/error.rs",
    "runtime/metadata/src/ids.rs",
    "runtime/metadata/src/lease.rs",
    "runtime/metadata/src/limits.rs",
    "runtime/metadata/src/name.rs",
    "runtime/metadata/src/record.rs",
    "runtime/metadata/src/record",
    "runtime/metadata/src/segments.rs",
    "runtime/metadata/src/store.rs",
    "runtime/metadata/src/table.rs",
    "runtime/metadata/src/table",
    "runtime/metadata/src/url.rs",
    "runtime/metadata/src/wire.rs",
];
/// Rooms that parse what others wrote.
const PARSERS: &[&str] = &["runtime/abi/src", "runtime/roce/src", "runtime/metadata/src"];
/// Where clocks may be read: one file of the root package, one of the metadata plane, and the thread that
/// steps emulated devices.
const CLOCKS: &[&str] =
    &["runtime/time.rs", "runtime/hca/src/emulated/thread.rs", "runtime/metadata/src/clock.rs"];
/// Where the environment may be read: one file, for what launchers say; a preloaded library has no other source.
const ENVIRONMENT: &[&str] = &["build.rs", "runtime/bootstrap/place.rs", "ffi/preload/src/settings.rs"];
/// Where the command talks to people.
const COMMAND: &[&str] = &["runtime/main.rs", "runtime/cli", "build.rs"];
/// The rules spell what they ban.
const RULES: &[&str] = &["tests/tidy.rs", "tests/tidy"];

const NO_CLOCK: &str = "take time as an argument, or use runtime/time.rs";
const NO_ENV: &str = "make it a field of Config; configuration is never ambient";
const NO_PANIC: &str = "bytes of a peer get a typed error, never a panic";
const NO_PRINT: &str = "return it; only the command prints";
const NO_PATH: &str = "nothing here depends on one machine's paths";
const NO_OPEN_POINT: &str = "an open point is an Error variant, a test or an issue";
const PURE_ROOM: &str = "a pure room names no clock, socket, thread, file or environment";
const KERNEL_FINISHES: &str = "a kernel reports a DeviceFault and finishes";
const PLAIN_LOADS: &str =
    "memory that is written while the kernel runs is not read through the non-coherent path";

const fn ban(needle: &'static str, scope: Scope, instead: &'static str) -> Ban {
    Ban { needle, scope, only: &[], except: &[], instead }
}

impl Ban {
    const fn only(mut self, paths: &'static [&'static str]) -> Self {
        self.only = paths;
        self
    }

    const fn except(mut self, paths: &'static [&'static str]) -> Self {
        self.except = paths;
        self
    }
}

/// All bans.
pub(crate) const BANS: &[Ban] = &[
    ban("std::time", Scope::ShippedRust, NO_CLOCK).except(CLOCKS),
    ban("Instant::now", Scope::ShippedRust, NO_CLOCK).except(CLOCKS),
    ban("SystemTime", Scope::ShippedRust, NO_CLOCK).except(CLOCKS),
    ban("thread::sleep", Scope::ShippedRust, NO_CLOCK)
        .except(&["runtime/time.rs", "runtime/hca/src/emulated"]),
    ban("env::var", Scope::ShippedRust, NO_ENV).except(ENVIRONMENT),
    ban("env::var_os", Scope::ShippedRust, NO_ENV).except(ENVIRONMENT),
    ban("getenv", Scope::ShippedRust, NO_ENV),
    ban("getenv", Scope::Kernels, NO_ENV),
    ban(".unwrap(", Scope::ShippedRust, "return a typed error, or `expect` with the invariant that holds"),
    ban("todo!", Scope::Rust, NO_OPEN_POINT),
    ban("unimplemented!", Scope::Rust, NO_OPEN_POINT),
    ban("dbg!", Scope::Rust, NO_PRINT),
    ban("println!", Scope::ShippedRust, NO_PRINT).except(COMMAND),
    ban("print!", Scope::ShippedRust, NO_PRINT).except(COMMAND),
    ban("eprintln!", Scope::ShippedRust, NO_PRINT).except(COMMAND),
    ban("eprint!", Scope::ShippedRust, NO_PRINT).except(COMMAND),
    ban("process::exit", Scope::ShippedRust, "return an error; main decides the exit code").except(COMMAND),
    ban("process::abort", Scope::ShippedRust, "return an error; the process is not ours to end"),
    ban("repr(packed)", Scope::Rust, "big-endian integer types have alignment 1; assert offsets instead"),
    ban("static mut", Scope::Rust, "own the state, or use an atomic"),
    ban("#[ignore]", Scope::Rust, "a skipped test says why: #[ignore = \"…\"], or prints its reason"),
    ban("anyhow", Scope::Rust, "errors are typed"),
    ban("panic!", Scope::ShippedRust, NO_PANIC).only(PARSERS),
    ban("unreachable!", Scope::ShippedRust, NO_PANIC).only(PARSERS),
    ban("thread::spawn", Scope::ShippedRust, PURE_ROOM).only(PURE),
    ban("thread::Builder", Scope::ShippedRust, PURE_ROOM).only(PURE),
    ban("TcpStream", Scope::ShippedRust, PURE_ROOM).only(PURE),
    ban("TcpListener", Scope::ShippedRust, PURE_ROOM).only(PURE),
    ban("UdpSocket", Scope::ShippedRust, PURE_ROOM).only(PURE),
    ban("std::fs", Scope::ShippedRust, PURE_ROOM).only(PURE),
    ban("std::io", Scope::ShippedRust, PURE_ROOM).only(PURE),
    ban("std::env", Scope::ShippedRust, PURE_ROOM).only(PURE),
    ban("std::process", Scope::ShippedRust, PURE_ROOM).only(PURE),
    ban("printf", Scope::Kernels, KERNEL_FINISHES),
    ban("__trap", Scope::Kernels, KERNEL_FINISHES),
    ban("__ldg", Scope::Kernels, PLAIN_LOADS),
    ban("TODO", Scope::AnyText, NO_OPEN_POINT).except(RULES),
    ban("FIXME", Scope::AnyText, NO_OPEN_POINT).except(RULES),
    ban("XXX", Scope::AnyText, NO_OPEN_POINT).except(RULES),
    ban("HACK", Scope::AnyText, NO_OPEN_POINT).except(RULES),
    ban("/work/", Scope::AnyText, NO_PATH).except(RULES),
    ban("/home/", Scope::AnyText, NO_PATH).except(RULES),
    ban("/root/", Scope::AnyText, NO_PATH).except(RULES),
    ban("/tmp/", Scope::AnyText, NO_PATH).except(RULES),
    ban("../shared", Scope::AnyText, NO_PATH).except(RULES),
];

impl Ban {
    /// Whether the ban looks at this file at all.
    pub(crate) fn covers(&self, source: &Source) -> bool {
        let in_scope = match self.scope {
            Scope::ShippedRust | Scope::Rust => source.language == Language::Rust,
            Scope::Kernels => {
                source.language == Language::Cpp
                    && (source.is_under("kernels/src") || source.is_under("kernels/include"))
            }
            Scope::AnyText => true,
        };
        let is_under = |paths: &[&str]| paths.iter().any(|path| source.is_under(path));
        in_scope && (self.only.is_empty() || is_under(self.only)) && !is_under(self.except)
    }

    fn check(&self, source: &Source, findings: &mut Vec<Finding>) {
        if !self.covers(source) {
            return;
        }
        let text = if self.scope == Scope::AnyText { &source.text } else { &source.code };
        for at in find_words(text, self.needle) {
            let line = line_at(text, at);
            let exempt = self.scope == Scope::ShippedRust && source.in_test.get(line) == Some(&true);
            if !exempt {
                let what = format!("`{}`: {}", self.needle, self.instead);
                findings.push(Finding::at(source, line, what));
            }
        }
    }
}

/// Everything the table bans in one file.
pub(crate) fn check(source: &Source, findings: &mut Vec<Finding>) {
    for ban in BANS {
        ban.check(source, findings);
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn findings(path: &str, text: &str, ban: &Ban) -> usize {
        let source = Source::new(Path::new(path), text.into());
        let mut findings = Vec::new();
        ban.check(&source, &mut findings);
        findings.len()
    }

    /// A file that the ban covers.
    fn path_for(ban: &Ban) -> String {
        let dir = match ban.scope {
            Scope::Kernels => return "kernels/src/sample.cu".into(),
            Scope::AnyText => return "README.md".into(),
            _ => ban.only.first().unwrap_or(&"runtime"),
        };
        if dir.ends_with(".rs") { (*dir).into() } else { format!("{dir}/sample.rs") }
    }

    #[test]
    fn every_ban_fires_on_a_bad_sample_and_only_there() {
        for ban in BANS {
            let (path, needle) = (path_for(ban), ban.needle);
            assert_eq!(findings(&path, &format!("a {needle} b\n"), ban), 1, "{needle} in {path}");
            for except in ban.except {
                assert_eq!(findings(except, &format!("a {needle} b\n"), ban), 0, "{needle} in {except}");
            }
            if ban.scope == Scope::AnyText {
                continue;
            }
            for harmless in [format!("// {needle}\n"), format!("\"{needle}\"\n")] {
                assert_eq!(findings(&path, &harmless, ban), 0, "{harmless}");
            }
        }
    }

    #[test]
    fn tests_may_do_what_shipped_code_may_not() {
        let text = "#[cfg(test)]\nmod tests {\n fn a() { b.unwrap(); }\n}\n";
        let ban = BANS.iter().find(|ban| ban.needle == ".unwrap(").unwrap();
        assert_eq!(findings("runtime/a.rs", text, ban), 0);
        assert_eq!(findings("tests/a.rs", "fn a() { b.unwrap(); }", ban), 0);
        assert_eq!(findings("runtime/a.rs", "fn a() { b.unwrap(); }", ban), 1);
    }
}
