//! Values too large for a record: in cells of the same store, behind a digest in the record's manifest.
//!
//! A parcel lies in pieces `cluster/parcels/DIGEST.N`. The digest covers the record's name, so that no two
//! records share pieces, and the value, so that a reader never joins pieces of two.
//!
//! INVARIANT: pieces are written before the record that names them is published, and emptied only after
//! one that does not was.

use std::fmt::Write;

use sha2::{Digest, Sha256};

use crate::error::{Bounded, InputError, Result, StoreError};
use crate::ids::Version;
use crate::limits::{CELL_LEN_MAX, PARCEL_LEN_MAX};
use crate::name::RecordName;
use crate::record::Manifest;
use crate::store::{Store, check_count};

/// How often writing one piece is tried anew because somebody else wrote it meanwhile.
const ATTEMPTS: usize = 8;

/// Lays `value` down and answers the manifest that a record finds it by; `None` for nothing.
pub(in crate::grpc) async fn put(
    store: &dyn Store,
    owner: &RecordName,
    kind: &str,
    value: &[u8],
) -> Result<Option<Manifest>> {
    if value.is_empty() {
        return Ok(None);
    }
    check_count(Bounded::Message, value.len(), PARCEL_LEN_MAX)?;
    let digest = digest(owner, value);
    let mut count = 0;
    for piece in value.chunks(CELL_LEN_MAX) {
        write(store, &piece_name(owner, &digest, count)?, piece).await?;
        count += 1;
    }
    let bytes = value.len() as u64;
    Ok(Some(Manifest { kind: kind.to_owned(), digest, count, bytes, ..Manifest::default() }))
}

/// The value behind a manifest; `None` if its pieces are gone, because the record has another one now.
pub(in crate::grpc) async fn get(
    store: &dyn Store,
    owner: &RecordName,
    manifest: &Manifest,
) -> Result<Option<Vec<u8>>> {
    let len = usize::try_from(manifest.bytes).unwrap_or(usize::MAX);
    check_count(Bounded::Message, len, PARCEL_LEN_MAX)?;
    let mut value = Vec::new();
    for index in 0..len.div_ceil(CELL_LEN_MAX) as u64 {
        match store.read_cell(&piece_name(owner, &manifest.digest, index)?).await {
            Ok(cell) => value.extend_from_slice(&cell.value),
            Err(StoreError::NotFound) => return Ok(None),
            Err(error) => return Err(error),
        }
    }
    Ok((digest(owner, &value) == manifest.digest).then_some(value))
}

/// Empties the pieces of a value that no record names any more.
pub(in crate::grpc) async fn clear(store: &dyn Store, owner: &RecordName, manifest: &Manifest) -> Result<()> {
    let len = usize::try_from(manifest.bytes).unwrap_or(usize::MAX);
    for index in 0..len.min(PARCEL_LEN_MAX).div_ceil(CELL_LEN_MAX) as u64 {
        write(store, &piece_name(owner, &manifest.digest, index)?, &[]).await?;
    }
    Ok(())
}

/// Makes a cell hold `value`, whatever it held.
pub(in crate::grpc) async fn write(store: &dyn Store, name: &RecordName, value: &[u8]) -> Result<()> {
    let mut conflict = StoreError::Conflict { current: Version(0) };
    for _ in 0..ATTEMPTS {
        let expect = match store.read_cell(name).await {
            Ok(cell) if cell.value == value => return Ok(()),
            Ok(cell) => cell.version,
            Err(StoreError::NotFound) => Version(0),
            Err(error) => return Err(error),
        };
        match store.swap_cell(name, expect, value).await {
            Ok(_) => return Ok(()),
            Err(error @ StoreError::Conflict { .. }) => conflict = error,
            Err(error) => return Err(error),
        }
    }
    Err(conflict)
}

fn digest(owner: &RecordName, value: &[u8]) -> Vec<u8> {
    let hash = Sha256::new().chain_update(owner.as_str()).chain_update([0]).chain_update(value);
    hash.finalize()[..16].to_vec()
}

fn piece_name(owner: &RecordName, digest: &[u8], index: u64) -> Result<RecordName, InputError> {
    let (cluster, _, _) = owner.parts();
    RecordName::new(cluster, "parcels", &format!("{}.{index}", hex(digest)))
}

pub(in crate::grpc) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut hex, byte| {
        // Writing to a string cannot fail.
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}
