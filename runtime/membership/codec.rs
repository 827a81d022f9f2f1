//! Bytes of the cells: view and row.
//!
//! Owns nothing. Bytes come from a store that others write and are not trusted: they make a value whose every field is
//! within its limits, or a typed refusal. Everything is little-endian.
//!
//! ```text
//!  view: "IBXV" version u16  serial u64  epoch u32  placement u32  num_slots u16
//!        per slot {state u8, instance u128, fence u64, since u64, evictions u32}
//!        has_plan u8 [plan]  has_start u8 [plan, epoch u32, from_step u64, seqs]
//!  plan: id u64  join[8 x u64]  leave[8 x u64]  placement u32
//!  seqs: num_lanes u8, per lane {dispatch u64, combine u64}
//!  row:  "IBXR" version u16  instance u128  seen u64  epoch u32  round u32  suspects[8 x u64]  applied u32
//!        num_links u16, per link {rank u16, instance u128, is_connected u8}
//!        has_ack u8 [plan u64, step u64, has_seq u8 [seqs]]
//!        has_ready u8 [digest u128]  is_leaving u8  placement u32
//! ```

use std::collections::BTreeMap;

use super::RankSet;
use super::view::{Instance, Link, Plan, Row, RowAck, Slot, SlotState, Start, View};
use crate::config::{LANES_MAX, NUM_RANKS_MAX};
use crate::ids::{Epoch, Rank};

const VIEW: [u8; 4] = *b"IBXV";
const ROW: [u8; 4] = *b"IBXR";
/// Version of the bytes.
const VERSION: u16 = 1;

/// Why bytes are no cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CellError {
    /// They do not begin as this cell does.
    #[error("these bytes are no {what}")]
    Magic {
        /// Which cell was read.
        what: &'static str,
    },
    /// Another version.
    #[error("the cell has version {found}, this build reads {known}")]
    Version {
        /// The version found.
        found: u16,
        /// The version that is read.
        known: u16,
    },
    /// They end too early, or go on after the end.
    #[error("the cell of {len} bytes is too short or too long")]
    Length {
        /// How many bytes there were.
        len: usize,
    },
    /// A field outside its limit.
    #[error("{field} = {value} of a cell is refused: at most {max}")]
    Field {
        /// Which field.
        field: &'static str,
        /// What it holds.
        value: u64,
        /// The largest that is valid.
        max: u64,
    },
}

impl View {
    /// The bytes that [`View::from_bytes`] reads.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut w = Writer::new(VIEW);
        w.u64(self.serial);
        w.u32(self.epoch.0);
        w.u32(self.placement_version);
        // CAST: at most NUM_RANKS_MAX slots.
        w.u16(self.slots.len() as u16);
        for slot in &self.slots {
            w.u8(state_code(slot.state));
            w.u128(slot.instance.0);
            w.u64(slot.fence);
            w.u64(slot.since);
            w.u32(slot.evictions);
        }
        w.option(self.plan.as_ref(), Writer::plan);
        w.option(self.start.as_ref(), |w, start| {
            w.plan(&start.plan);
            w.u32(start.epoch.0);
            w.u64(start.from_step);
            w.seqs(&start.from_seq);
        });
        w.0
    }

    /// Reads what [`View::to_bytes`] wrote.
    ///
    /// # Errors
    /// [`CellError`]: the bytes may be anything.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, CellError> {
        let mut r = Reader::new(bytes, VIEW, "view")?;
        let (serial, epoch, placement_version) = (r.u64()?, Epoch(r.u32()?), r.u32()?);
        let num_slots = r.u16("slots", NUM_RANKS_MAX)?;
        let slots = (0..num_slots).map(|_| r.slot()).collect::<Result<_, _>>()?;
        let plan = r.option(Reader::plan)?;
        let start = r.option(|r| {
            let (plan, epoch) = (r.plan()?, Epoch(r.u32()?));
            Ok(Start { plan, epoch, from_step: r.u64()?, from_seq: r.seqs()? })
        })?;
        r.end(Self { serial, epoch, placement_version, slots, plan, start })
    }
}

impl Row {
    /// The bytes that [`Row::from_bytes`] reads.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut w = Writer::new(ROW);
        w.u128(self.instance.0);
        w.u64(self.seen);
        w.u32(self.epoch.0);
        w.u32(self.round);
        w.ranks(&self.suspects);
        w.u32(self.applied.0);
        // CAST: at most one link per rank.
        w.u16(self.links.len() as u16);
        for (rank, link) in &self.links {
            w.u16(rank.0);
            w.u128(link.instance.0);
            w.u8(link.is_connected.into());
        }
        w.option(self.ack.as_ref(), |w, ack| {
            w.u64(ack.plan);
            w.u64(ack.step);
            w.option(ack.next_seq.as_deref(), Writer::seqs);
        });
        w.option(self.ready.as_ref(), |w, digest| w.u128(*digest));
        w.u8(self.is_leaving.into());
        w.u32(self.placement_version);
        w.0
    }

    /// Reads what [`Row::to_bytes`] wrote.
    ///
    /// # Errors
    /// [`CellError`]: the bytes may be anything.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, CellError> {
        let mut r = Reader::new(bytes, ROW, "row")?;
        let (instance, seen) = (Instance(r.u128()?), r.u64()?);
        let (epoch, round, suspects, applied) = (Epoch(r.u32()?), r.u32()?, r.ranks()?, Epoch(r.u32()?));
        let num_links = r.u16("links", NUM_RANKS_MAX)?;
        let links = (0..num_links).map(|_| r.link()).collect::<Result<BTreeMap<_, _>, _>>()?;
        let ack =
            r.option(|r| Ok(RowAck { plan: r.u64()?, step: r.u64()?, next_seq: r.option(Reader::seqs)? }))?;
        let ready = r.option(Reader::u128)?;
        let (is_leaving, placement_version) = (r.flag("is_leaving")?, r.u32()?);
        r.end(Self {
            instance,
            seen,
            epoch,
            round,
            suspects,
            applied,
            links,
            ack,
            ready,
            is_leaving,
            placement_version,
        })
    }
}

fn state_code(state: SlotState) -> u8 {
    match state {
        SlotState::Vacant => 0,
        SlotState::Joining => 1,
        SlotState::Member => 2,
    }
}

/// Appends fields.
struct Writer(Vec<u8>);

impl Writer {
    fn new(magic: [u8; 4]) -> Self {
        let mut w = Self(magic.to_vec());
        w.u16(VERSION);
        w
    }

    fn u8(&mut self, value: u8) {
        self.0.push(value);
    }

    fn u16(&mut self, value: u16) {
        self.0.extend(value.to_le_bytes());
    }

    fn u32(&mut self, value: u32) {
        self.0.extend(value.to_le_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.0.extend(value.to_le_bytes());
    }

    fn u128(&mut self, value: u128) {
        self.0.extend(value.to_le_bytes());
    }

    fn ranks(&mut self, ranks: &RankSet) {
        ranks.words().iter().for_each(|word| self.u64(*word));
    }

    fn seqs(&mut self, seqs: &[[u64; 2]]) {
        // CAST: one entry per lane, at most LANES_MAX.
        self.u8(seqs.len() as u8);
        seqs.iter().flatten().for_each(|seq| self.u64(*seq));
    }

    fn plan(&mut self, plan: &Plan) {
        self.u64(plan.id);
        self.ranks(&plan.join);
        self.ranks(&plan.leave);
        self.u32(plan.placement_version);
    }

    fn option<T: ?Sized>(&mut self, value: Option<&T>, put: impl FnOnce(&mut Self, &T)) {
        self.u8(value.is_some().into());
        if let Some(value) = value {
            put(self, value);
        }
    }
}

/// Takes fields off the front of bytes that may end anywhere.
struct Reader<'a> {
    rest: &'a [u8],
    len: usize,
}

impl<'a> Reader<'a> {
    fn new(bytes: &'a [u8], magic: [u8; 4], what: &'static str) -> Result<Self, CellError> {
        let mut reader = Self { rest: bytes, len: bytes.len() };
        if reader.take::<4>()? != magic {
            return Err(CellError::Magic { what });
        }
        let found = u16::from_le_bytes(reader.take()?);
        if found == VERSION { Ok(reader) } else { Err(CellError::Version { found, known: VERSION }) }
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], CellError> {
        let (field, rest) = self.rest.split_first_chunk().ok_or(CellError::Length { len: self.len })?;
        self.rest = rest;
        Ok(*field)
    }

    fn code(&mut self, field: &'static str, max: u8) -> Result<u8, CellError> {
        let [value] = self.take()?;
        check(field, value.into(), max.into())?;
        Ok(value)
    }

    fn flag(&mut self, field: &'static str) -> Result<bool, CellError> {
        Ok(self.code(field, 1)? != 0)
    }

    fn u16(&mut self, field: &'static str, max: u32) -> Result<u16, CellError> {
        let value = u16::from_le_bytes(self.take()?);
        check(field, value.into(), max.into())?;
        Ok(value)
    }

    fn u32(&mut self) -> Result<u32, CellError> {
        Ok(u32::from_le_bytes(self.take()?))
    }

    fn u64(&mut self) -> Result<u64, CellError> {
        Ok(u64::from_le_bytes(self.take()?))
    }

    fn u128(&mut self) -> Result<u128, CellError> {
        Ok(u128::from_le_bytes(self.take()?))
    }

    fn ranks(&mut self) -> Result<RankSet, CellError> {
        let mut words = *RankSet::EMPTY.words();
        for word in &mut words {
            *word = self.u64()?;
        }
        Ok(RankSet::from_words(words))
    }

    fn seqs(&mut self) -> Result<Vec<[u64; 2]>, CellError> {
        // CAST: LANES_MAX fits.
        let num_lanes = self.code("lanes", LANES_MAX as u8)?;
        (0..num_lanes).map(|_| Ok([self.u64()?, self.u64()?])).collect()
    }

    fn slot(&mut self) -> Result<Slot, CellError> {
        let state = match self.code("slot state", 2)? {
            0 => SlotState::Vacant,
            1 => SlotState::Joining,
            _ => SlotState::Member,
        };
        Ok(Slot {
            state,
            instance: Instance(self.u128()?),
            fence: self.u64()?,
            since: self.u64()?,
            evictions: self.u32()?,
        })
    }

    fn plan(&mut self) -> Result<Plan, CellError> {
        Ok(Plan {
            id: self.u64()?,
            join: self.ranks()?,
            leave: self.ranks()?,
            placement_version: self.u32()?,
        })
    }

    fn link(&mut self) -> Result<(Rank, Link), CellError> {
        let rank = Rank(self.u16("link rank", NUM_RANKS_MAX - 1)?);
        let link = Link { instance: Instance(self.u128()?), is_connected: self.flag("is_connected")? };
        Ok((rank, link))
    }

    fn option<T>(
        &mut self,
        read: impl FnOnce(&mut Self) -> Result<T, CellError>,
    ) -> Result<Option<T>, CellError> {
        self.flag("presence").and_then(|is_there| is_there.then(|| read(self)).transpose())
    }

    fn end<T>(self, value: T) -> Result<T, CellError> {
        if self.rest.is_empty() { Ok(value) } else { Err(CellError::Length { len: self.len }) }
    }
}

fn check(field: &'static str, value: u64, max: u64) -> Result<(), CellError> {
    if value <= max { Ok(()) } else { Err(CellError::Field { field, value, max }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn plan() -> Plan {
        let ranks = |ranks: &[u16]| ranks.iter().map(|rank| Rank(*rank)).collect();
        Plan { id: 1 << 40, join: ranks(&[0, 511]), leave: ranks(&[64]), placement_version: 7 }
    }

    fn view() -> View {
        let slot =
            |state, n: u128| Slot { state, instance: Instance(n << 99), fence: 8, since: 3, evictions: 2 };
        View {
            serial: 9,
            epoch: Epoch(4),
            placement_version: 2,
            slots: vec![slot(SlotState::Member, 1), slot(SlotState::Joining, 2), Slot::default()],
            plan: Some(plan()),
            start: Some(Start {
                plan: plan(),
                epoch: Epoch(3),
                from_step: 17,
                from_seq: vec![[1, u64::MAX]],
            }),
        }
    }

    fn row() -> Row {
        let link = |n, is_connected| Link { instance: Instance(n), is_connected };
        Row {
            instance: Instance(u128::MAX),
            seen: 8,
            epoch: Epoch(4),
            round: 2,
            suspects: RankSet::first(3),
            applied: Epoch(3),
            links: BTreeMap::from([(Rank(1), link(5, true)), (Rank(511), link(6, false))]),
            ack: Some(RowAck { plan: 9, step: 12, next_seq: Some(vec![[3, 4], [5, 6]]) }),
            ready: Some(77),
            is_leaving: true,
            placement_version: 2,
        }
    }

    #[test]
    fn cells_survive_their_bytes_and_no_part_of_them_is_one() {
        let (view, row) = (view(), row());
        assert_eq!(View::from_bytes(&view.to_bytes()), Ok(view.clone()));
        assert_eq!(Row::from_bytes(&row.to_bytes()), Ok(row.clone()));
        let bare = View { plan: None, start: None, ..View::empty(2) };
        assert_eq!(View::from_bytes(&bare.to_bytes()), Ok(bare));
        let bare = Row { ack: Some(RowAck { plan: 1, step: 0, next_seq: None }), ..Row::default() };
        assert_eq!(Row::from_bytes(&bare.to_bytes()), Ok(bare));
        let (view, row) = (view.to_bytes(), row.to_bytes());
        for len in 0..view.len() {
            assert_eq!(View::from_bytes(&view[..len]), Err(CellError::Length { len }));
        }
        for len in 0..row.len() {
            assert_eq!(Row::from_bytes(&row[..len]), Err(CellError::Length { len }));
        }
        let longer = [&row[..], &[0]].concat();
        assert_eq!(Row::from_bytes(&longer), Err(CellError::Length { len: longer.len() }));
        assert_eq!(Row::from_bytes(&view), Err(CellError::Magic { what: "row" }));
    }

    #[test]
    fn fields_outside_their_limits_are_refused_by_name() {
        let with = |at: usize, value: &[u8]| {
            let mut bytes = view().to_bytes();
            bytes[at..at + value.len()].copy_from_slice(value);
            View::from_bytes(&bytes).unwrap_err()
        };
        let refused = |field, value, max| CellError::Field { field, value, max };
        assert_eq!(with(4, &[2, 0]), CellError::Version { found: 2, known: 1 });
        assert_eq!(with(22, &[1, 2]), refused("slots", 513, 512));
        assert_eq!(with(24, &[3]), refused("slot state", 3, 2));
        assert_eq!(with(24 + 3 * 37, &[2]), refused("presence", 2, 1));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(
            at in 0_usize..600, bytes in prop::collection::vec(any::<u8>(), 0..64),
        ) {
            let _ = (View::from_bytes(&bytes), Row::from_bytes(&bytes));
            for mut cell in [view().to_bytes(), row().to_bytes()] {
                let at = at % cell.len();
                let len = bytes.len().min(cell.len() - at);
                cell[at..at + len].copy_from_slice(&bytes[..len]);
                if let Ok(view) = View::from_bytes(&cell) {
                    prop_assert_eq!(View::from_bytes(&view.to_bytes()), Ok(view));
                }
                if let Ok(row) = Row::from_bytes(&cell) {
                    prop_assert_eq!(Row::from_bytes(&row.to_bytes()), Ok(row));
                }
            }
        }
    }
}
