//! Values that a group shares.

use std::sync::Arc;

use super::Case;
use crate::error::{Bounded, StoreError};
use crate::ids::Version;
use crate::limits::CELL_LEN_MAX;
use crate::store::Cell;

pub(super) async fn a_cell_is_changed_by_compare_and_set_alone(case: &Case<'_>) {
    let name = case.name("view");
    assert_eq!(case.store.read_cell(&name).await, Err(StoreError::NotFound));
    let absent = StoreError::Conflict { current: Version(0) };
    assert_eq!(case.store.swap_cell(&name, Version(1), b"x").await, Err(absent.clone()));
    assert_eq!(case.store.swap_cell(&name, Version(u64::MAX), b"x").await, Err(absent));
    assert_eq!(case.store.swap_cell(&name, Version(0), b"").await, Ok(Version(1)));
    let empty = Cell { version: Version(1), value: vec![] };
    assert_eq!(case.store.read_cell(&name).await, Ok(empty), "an empty value is a value");
    let bytes: Vec<u8> = (0..=255).collect();
    assert_eq!(case.store.swap_cell(&name, Version(1), &bytes).await, Ok(Version(2)));
    let conflict = Err(StoreError::Conflict { current: Version(2) });
    assert_eq!(case.store.swap_cell(&name, Version(0), b"x").await, conflict);
    assert_eq!(case.store.swap_cell(&name, Version(1), b"x").await, conflict);
    assert_eq!(case.store.read_cell(&name).await, Ok(Cell { version: Version(2), value: bytes }));
    // A cell is no record, although it has a name of the same kind.
    assert_eq!(case.store.get(&name).await, Err(StoreError::NotFound));
}

pub(super) async fn one_of_many_swaps_wins(case: &Case<'_>) {
    let name = case.name("view");
    for version in (0..3).map(Version) {
        let swaps: Vec<_> = (0..8u8)
            .map(|who| {
                let (store, name) = (Arc::clone(&case.store), name.clone());
                tokio::spawn(async move { store.swap_cell(&name, version, &[who]).await })
            })
            .collect();
        let mut winner = None;
        for (who, swap) in (0..).zip(swaps) {
            match swap.await.expect("no swap panics") {
                Ok(_) => assert_eq!(winner.replace(who), None, "two winners of {version}"),
                Err(error) => assert_eq!(error, StoreError::Conflict { current: Version(version.0 + 1) }),
            }
        }
        let cell = case.store.read_cell(&name).await.expect("it was swapped");
        assert_eq!(cell.value, [winner.expect("somebody wins")]);
    }
}

pub(super) async fn cells_are_bounded(case: &Case<'_>) {
    let name = case.name("view");
    let largest = vec![1; CELL_LEN_MAX];
    assert_eq!(case.store.swap_cell(&name, Version(0), &largest).await, Ok(Version(1)));
    let refused = case.store.swap_cell(&name, Version(1), &vec![1; CELL_LEN_MAX + 1]).await;
    let (len, limit) = (CELL_LEN_MAX as u64 + 1, CELL_LEN_MAX as u64);
    assert_eq!(refused, Err(StoreError::TooLarge { what: Bounded::Cell, len, limit }));
    let cell = case.store.read_cell(&name).await.expect("it is as it was");
    assert_eq!((cell.version, cell.value.len()), (Version(1), CELL_LEN_MAX));
}
