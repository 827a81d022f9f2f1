//! One owner's record, published change by change.
//!
//! A [`Publisher`] owns the owner's copy of its record and the version it has in the store. Changes are made
//! one after the other, each by compare-and-set.
//!
//! INVARIANT: after a publish whose answer was lost, the copy is not trusted: the next change begins with
//! what the store has. A change that failed leaves the copy as it was.

use std::sync::Arc;

use tokio::sync::Mutex;

use crate::error::Result;
use crate::ids::{Stamp, Version};
use crate::record::{Identity, PeerRecord};
use crate::store::{Hold, Store};

/// Publishes the record of one name. See the module's documentation.
#[derive(Debug)]
pub struct Publisher {
    store: Arc<dyn Store>,
    hold: Hold,
    copy: Mutex<Copy>,
}

#[derive(Debug)]
struct Copy {
    record: PeerRecord,
    version: Version,
    /// A publish was sent and never answered.
    doubtful: bool,
}

impl Publisher {
    /// The publisher of a name that was just claimed: its record is empty, at version 0.
    #[must_use]
    pub fn new(store: &Arc<dyn Store>, hold: Hold) -> Self {
        let record = PeerRecord::empty(&hold.name, Identity::Instance(hold.instance));
        let copy = Mutex::new(Copy { record, version: Version(0), doubtful: false });
        Self { store: Arc::clone(store), hold, copy }
    }

    /// Under which hold it publishes.
    #[must_use]
    pub const fn hold(&self) -> &Hold {
        &self.hold
    }

    /// The store.
    #[must_use]
    pub const fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// The record as it was last published.
    pub async fn record(&self) -> PeerRecord {
        self.copy.lock().await.record.clone()
    }

    /// Makes a change and publishes the result; says under which stamp. `change` may see a record that this
    /// process published although it was told otherwise.
    ///
    /// # Errors
    /// As [`Store::publish`]; whether a change took effect is unknown only after
    /// [`StoreError::Deadline`](crate::error::StoreError::Deadline) and
    /// [`StoreError::Unavailable`](crate::error::StoreError::Unavailable).
    pub async fn update(&self, change: impl FnOnce(&mut PeerRecord)) -> Result<Stamp> {
        let mut copy = self.copy.lock().await;
        if copy.doubtful {
            let leased = self.store.get(&self.hold.name).await?;
            let stored = leased.unchecked();
            if stored.stamp.fence == self.hold.fence {
                copy.version = stored.stamp.version;
                copy.record = stored.record.clone();
            }
            copy.doubtful = false;
        }
        let mut record = copy.record.clone();
        change(&mut record);
        // Until there is an answer; also if whoever asked stops waiting for it.
        copy.doubtful = true;
        let published = self.store.publish(&self.hold, copy.version, &record).await;
        match published {
            Ok(version) => *copy = Copy { record, version, doubtful: false },
            Err(ref error) => copy.doubtful = error.is_transient(),
        }
        published.map(|version| Stamp::new(self.hold.fence, version))
    }
}
