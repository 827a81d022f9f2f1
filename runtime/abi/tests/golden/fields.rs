//! `prm_fields.txt`, `prm_codes.txt`: every field constant, opcode and status against tables derived
//! from public headers.

use std::collections::BTreeMap;

use ibex_abi::prm::{self, Field, Layout, Op, Status};

use super::text::{lines, number};

/// Size of a layout and its fields' alternatives, by name.
struct Table {
    len: usize,
    fields: BTreeMap<String, Vec<(u32, u32)>>,
}

fn tables() -> BTreeMap<String, Table> {
    let mut tables = BTreeMap::new();
    let mut current = None;
    for (at, line) in lines("prm_fields.txt") {
        let words: Vec<&str> = line.split(' ').collect();
        if let ["layout", name, len] = words[..] {
            let table = Table { len: number(len) as usize, fields: BTreeMap::new() };
            assert!(tables.insert(name.to_owned(), table).is_none(), "line {at}: {name} again");
            current = Some(name.to_owned());
            continue;
        }
        let [field, off, width, sources] = words[..] else { panic!("line {at}: {line:?}") };
        assert!(sources.chars().all(|source| "LRDNCMI".contains(source)), "line {at}");
        let table = tables.get_mut(current.as_ref().unwrap()).unwrap();
        let place = (number(off) as u32, number(width) as u32);
        table.fields.entry(field.to_owned()).or_default().push(place);
    }
    tables
}

/// The crate's constants by the tables' names: `LEN` is taken by the size of every layout.
fn constants(layout: &Layout) -> BTreeMap<String, Field> {
    let named = layout.fields.iter().map(|&(name, field)| match (layout.name, name) {
        ("mkc", "REGION_LEN") => ("len".to_owned(), field),
        _ => (name.to_lowercase(), field),
    });
    named.collect()
}

#[test]
fn every_field_constant_is_where_public_headers_put_it() {
    let mut tables = tables();
    let mut compared = 0;
    for layout in prm::all_layouts() {
        let name = layout.name;
        let table = tables.remove(name).unwrap_or_else(|| panic!("no table for {name}"));
        assert_eq!(layout.len, table.len, "size of {name}");
        let constants = constants(layout);
        assert_eq!(constants.len(), layout.fields.len(), "a name of {name} twice");
        for (field, places) in &table.fields {
            let constant = constants.get(field).unwrap_or_else(|| panic!("no {name}::{field}"));
            let place = (constant.bit_off(), constant.width());
            assert!(places.contains(&place), "{name}::{field} is {place:x?}, not {places:x?}");
            compared += 1;
        }
        let known = |field: &&String| table.fields.contains_key(*field);
        assert_eq!(constants.keys().filter(known).count(), constants.len(), "extra in {name}");
    }
    assert!(tables.is_empty(), "no layouts for {:?}", tables.keys());
    assert!(compared > 450, "only {compared} fields compared");
}

#[test]
fn fields_lie_in_their_layout_and_overlap_only_where_sources_disagree() {
    // Two readings of the same bits; one field of each pair is reserved in the other source.
    let known = [("cqc", "CQE_COMPRESSION_LAYOUT"), ("cqc", "C_EQN")];
    for layout in prm::all_layouts() {
        let mut end = 0;
        for &(name, field) in layout.fields {
            let bits = field.bit_off()..field.bit_off() + field.width();
            // A list begins where the layout ends.
            assert!(field.bytes().start <= layout.len, "{}::{name} lies outside", layout.name);
            let overlaps = bits.start < end;
            assert_eq!(overlaps, known.contains(&(layout.name, name)), "{}::{name}", layout.name);
            end = bits.end.max(end);
        }
    }
}

/// The Linux error number with this name.
fn errno(name: &str) -> i32 {
    match name {
        "0" => 0,
        "EIO" => 5,
        "EAGAIN" => 11,
        "ENOMEM" => 12,
        "EBUSY" => 16,
        "EINVAL" => 22,
        other => panic!("no number for {other}"),
    }
}

#[test]
fn every_opcode_and_status_has_the_number_of_public_headers() {
    let (mut ops, mut statuses) = (Vec::new(), Vec::new());
    for (at, line) in lines("prm_codes.txt") {
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["op", name, code, "C" | "O" | "L"] => {
                let op = Op::from_code(number(code) as u16).unwrap();
                assert_eq!(op.name(), name, "line {at}");
                ops.push(op);
            }
            ["status", name, code, error] => {
                let status = Status::from_code(number(code) as u8).unwrap();
                assert_eq!((status.name(), status.errno()), (name, errno(error)), "line {at}");
                statuses.push(status.code());
            }
            _ => panic!("line {at}: {line:?}"),
        }
    }
    assert_eq!(ops, Op::ALL);
    statuses.sort_unstable();
    assert_eq!(statuses, Status::ALL.iter().map(|status| status.code()).collect::<Vec<_>>());
}
