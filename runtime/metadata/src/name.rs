//! Names of records: `cluster/group/name`, checked once, cheap to copy.

use std::fmt;
use std::sync::Arc;

use crate::error::InputError;
use crate::limits::NAME_PART_LEN_MAX;

/// The key of a record or of a cell: `cluster/group/name`.
///
/// Each part has 1 to [`NAME_PART_LEN_MAX`] characters out of `A-Z a-z 0-9 . _ -` and does not begin
/// with a dot, so that it is safe in a URL, in a file name and in a Kubernetes label.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RecordName(Arc<str>);

impl RecordName {
    /// The name made of three parts.
    ///
    /// # Errors
    /// [`InputError`] for the first part that breaks the rule.
    pub fn new(cluster: &str, group: &str, name: &str) -> Result<Self, InputError> {
        for (field, part) in [("cluster", cluster), ("group", group), ("name", name)] {
            check_part(field, part)?;
        }
        Ok(Self(format!("{cluster}/{group}/{name}").into()))
    }

    /// Reads `cluster/group/name`.
    ///
    /// # Errors
    /// [`InputError`] unless there are exactly three valid parts.
    pub fn parse(text: &str) -> Result<Self, InputError> {
        let mut parts = text.split('/');
        match (parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some(cluster), Some(group), Some(name), None) => Self::new(cluster, group, name),
            _ => Err(InputError::new("name", text, "cluster/group/name")),
        }
    }

    /// The whole name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Cluster, group and name.
    #[must_use]
    pub fn parts(&self) -> (&str, &str, &str) {
        let (cluster, rest) = self.0.split_once('/').unwrap_or((&self.0, ""));
        let (group, name) = rest.split_once('/').unwrap_or((rest, ""));
        (cluster, group, name)
    }
}

impl fmt::Display for RecordName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for RecordName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RecordName({self})")
    }
}

/// What a listing or a watch covers: everything, one cluster, one group, or one name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Prefix(String);

impl Prefix {
    /// Covers every name.
    #[must_use]
    pub fn all() -> Self {
        Self::default()
    }

    /// Reads ``, `cluster`, `cluster/group` or `cluster/group/name`; a closing slash is tolerated.
    ///
    /// # Errors
    /// [`InputError`] for a part that breaks the rule of [`RecordName`], or for a fourth part.
    pub fn parse(text: &str) -> Result<Self, InputError> {
        let trimmed = text.strip_suffix('/').unwrap_or(text);
        if trimmed.is_empty() {
            return if text.is_empty() { Ok(Self::all()) } else { Err(Self::refusal(text)) };
        }
        let parts: Vec<&str> = trimmed.split('/').collect();
        if parts.len() > 3 {
            return Err(Self::refusal(text));
        }
        for part in parts {
            check_part("prefix", part)?;
        }
        Ok(Self(trimmed.to_owned()))
    }

    fn refusal(text: &str) -> InputError {
        InputError::new("prefix", text, "nothing, cluster, cluster/group or cluster/group/name")
    }

    /// Whether a name lies under this prefix. Parts are compared whole: `a/b` does not cover `a/bc/d`.
    #[must_use]
    pub fn covers(&self, name: &RecordName) -> bool {
        let Some(rest) = name.as_str().strip_prefix(&self.0) else { return false };
        self.0.is_empty() || rest.is_empty() || rest.starts_with('/')
    }

    /// The prefix as it was given, without a closing slash.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<&RecordName> for Prefix {
    fn from(name: &RecordName) -> Self {
        Self(name.as_str().to_owned())
    }
}

fn check_part(field: &'static str, part: &str) -> Result<(), InputError> {
    let is_allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let good_len = (1..=NAME_PART_LEN_MAX).contains(&part.len());
    if good_len && !part.starts_with('.') && part.chars().all(is_allowed) {
        return Ok(());
    }
    Err(InputError::new(field, part, "1 to 63 characters of A-Z a-z 0-9 . _ -, not beginning with a dot"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_names_are_taken_apart_again() {
        let name = RecordName::parse("prod/moe-0/rank.7").unwrap();
        assert_eq!(name.parts(), ("prod", "moe-0", "rank.7"));
        assert_eq!(RecordName::new("prod", "moe-0", "rank.7").unwrap(), name);
    }

    #[test]
    fn bad_names_are_refused() {
        let long = "a".repeat(64);
        for bad in ["", "a/b", "a/b/c/d", "a//c", "a/b/", "a/b/c d", "a/b/ä", "../b/c", "a/b/.c"] {
            assert!(RecordName::parse(bad).is_err(), "{bad}");
        }
        let error = RecordName::new("a", &long, "c").unwrap_err();
        assert_eq!(error.field, "group");
        assert!(error.to_string().contains("1 to 63 characters"), "{error}");
    }

    #[test]
    fn prefixes_cover_whole_parts() {
        let name = RecordName::parse("a/bc/d").unwrap();
        for (prefix, covers) in
            [("", true), ("a", true), ("a/", true), ("a/b", false), ("a/bc", true), ("a/bc/d", true)]
        {
            assert_eq!(Prefix::parse(prefix).unwrap().covers(&name), covers, "{prefix}");
        }
        for bad in ["/", "a//", "a/b/c/d", "a b"] {
            assert!(Prefix::parse(bad).is_err(), "{bad}");
        }
    }
}
