//! What changed lately, so that a watch can resume.

use std::collections::VecDeque;

use crate::ids::Revision;
use crate::limits::HISTORY_LEN_MAX;
use crate::name::Prefix;
use crate::store::{Change, Event};

/// The newest changes, each under its own revision, without holes.
#[derive(Debug, Default)]
pub(super) struct History {
    events: VecDeque<Event>,
    newest: Revision,
}

impl History {
    /// Goes on after a history that is not remembered.
    pub(super) fn continuing(revision: Revision) -> Self {
        Self { events: VecDeque::new(), newest: revision }
    }

    pub(super) fn newest(&self) -> Revision {
        self.newest
    }

    pub(super) fn push(&mut self, change: Change) -> Revision {
        if self.events.len() == HISTORY_LEN_MAX {
            self.events.pop_front();
        }
        self.newest = Revision(self.newest.0.saturating_add(1));
        self.events.push_back(Event { revision: self.newest, change });
        self.newest
    }

    /// The newest revision that is not remembered.
    fn forgotten(&self) -> u64 {
        self.newest.0 - self.events.len() as u64
    }

    /// At most `limit` events after `from`, and where to go on. A `from` that is forgotten, or that this
    /// history never reached, gives one [`Change::Gap`].
    pub(super) fn events(&self, prefix: &Prefix, from: Revision, limit: usize) -> (Vec<Event>, Revision) {
        if from.0 < self.forgotten() || from > self.newest {
            return (vec![Event { revision: self.newest, change: Change::Gap }], self.newest);
        }
        // Fits: it is at most the number of events.
        let skip = usize::try_from(from.0 - self.forgotten()).unwrap_or(usize::MAX);
        let mut found = Vec::new();
        let mut looked = from;
        for event in self.events.iter().skip(skip) {
            if found.len() == limit {
                return (found, looked);
            }
            looked = event.revision;
            if event.change.name().is_none_or(|name| prefix.covers(name)) {
                found.push(event.clone());
            }
        }
        (found, looked)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::Version;
    use crate::name::RecordName;

    fn change(name: &str) -> Change {
        Change::Cell { name: RecordName::parse(name).unwrap(), version: Version(1) }
    }

    #[test]
    fn a_watch_resumes_where_it_stopped() {
        let mut history = History::continuing(Revision(100));
        history.push(change("a/b/1"));
        history.push(change("a/c/2"));
        history.push(change("a/b/3"));
        let prefix = Prefix::parse("a/b").unwrap();
        let (events, at) = history.events(&prefix, Revision(100), 1);
        assert_eq!((events.len(), events[0].revision, at), (1, Revision(101), Revision(101)));
        let (events, at) = history.events(&prefix, at, 10);
        assert_eq!((events.len(), events[0].revision, at), (1, Revision(103), Revision(103)));
        assert_eq!(history.events(&prefix, at, 10), (vec![], at));
    }

    #[test]
    fn what_is_forgotten_or_ahead_is_a_gap() {
        let mut history = History::continuing(Revision(100));
        for _ in 0..=HISTORY_LEN_MAX {
            history.push(change("a/b/1"));
        }
        let newest = history.newest();
        for from in [Revision(0), Revision(100), Revision(newest.0 + 1)] {
            let (events, at) = history.events(&Prefix::all(), from, 10);
            assert_eq!((events.len(), &events[0].change, at), (1, &Change::Gap, newest), "{from}");
        }
        let (events, _) = history.events(&Prefix::all(), Revision(101), 10);
        assert_eq!(events[0].revision, Revision(102));
    }
}
