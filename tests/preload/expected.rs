//! The committed list of tests that do not pass, and why.

use crate::suite::TestResult;

/// One line of the list: `LINK OUTCOME TEST` and, indented, the reason for all lines above it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Expected {
    link: String,
    outcome: String,
    test: String,
    reason: String,
}

impl Expected {
    fn names(&self, link: &str, test: &str) -> bool {
        (self.link == "both" || self.link == link) && self.test == test
    }
}

/// What a result means beside the list.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Passed,
    Listed,
    Wrong(String),
}

/// Reads the list.
pub(crate) fn read(text: &str) -> Vec<Expected> {
    let (mut list, mut reason) = (Vec::new(), String::new());
    for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        if let Some(said) = line.strip_suffix(':') {
            reason = said.to_owned();
            continue;
        }
        let fields: Vec<_> = line.split_whitespace().map(str::to_owned).collect();
        let [link, outcome, test] = <[String; 3]>::try_from(fields).unwrap();
        assert!(!reason.is_empty(), "{line} has no reason");
        list.push(Expected { link, outcome, test, reason: reason.clone() });
    }
    list
}

/// Judges one result: a test passes, or stands in the list with the outcome that it had.
pub(crate) fn judge(list: &[Expected], link: &str, result: &TestResult) -> Verdict {
    let listed = list.iter().find(|entry| entry.names(link, &result.test));
    let TestResult { test, outcome, reason } = result;
    match (outcome.as_str(), listed) {
        ("passed", None) => Verdict::Passed,
        ("passed", Some(entry)) => {
            Verdict::Wrong(format!("{link} {test} passes: take it off the list ({})", entry.reason))
        }
        // Nothing excuses a crash.
        (_, Some(entry)) if entry.outcome == *outcome && outcome != "crashed" => Verdict::Listed,
        _ => Verdict::Wrong(format!("{link} {outcome} {test}: {reason}")),
    }
}

/// Complaints about entries of the list that no run of a link had.
pub(crate) fn unseen(list: &[Expected], link: &str, results: &[TestResult]) -> Vec<String> {
    let was_seen = |entry: &&Expected| results.iter().any(|result| entry.names(link, &result.test));
    let of_link = list.iter().filter(|entry| entry.link == "both" || entry.link == link);
    let missing = of_link.filter(|entry| !was_seen(entry));
    missing.map(|entry| format!("{link} {} is listed and was not run", entry.test)).collect()
}

#[test]
fn only_what_is_listed_with_its_outcome_is_excused() {
    let list = read("# a comment\nno such thing:\nib skipped a.B.c\nboth crashed a.B.e\n");
    let result = |test: &str, outcome: &str| TestResult {
        test: test.into(),
        outcome: outcome.into(),
        reason: String::new(),
    };
    let is_wrong =
        |link, test, outcome| matches!(judge(&list, link, &result(test, outcome)), Verdict::Wrong(_));
    assert_eq!(judge(&list, "ib", &result("a.B.c", "skipped")), Verdict::Listed);
    assert_eq!(judge(&list, "ib", &result("a.B.d", "passed")), Verdict::Passed);
    assert!(is_wrong("ib", "a.B.c", "passed"));
    assert!(is_wrong("ib", "a.B.c", "error"));
    assert!(is_wrong("roce", "a.B.c", "skipped"));
    assert!(is_wrong("roce", "a.B.e", "crashed"));
    let results = [result("a.B.e", "crashed")];
    assert_eq!(unseen(&list, "ib", &results), ["ib a.B.c is listed and was not run"]);
    assert_eq!(unseen(&list, "roce", &results), [] as [&str; 0]);
}
