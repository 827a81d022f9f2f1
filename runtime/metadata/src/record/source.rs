//! Which weights a peer holds, and the id under which ModelExpress knows them.

use std::collections::BTreeMap;
use std::fmt::Write;

use sha2::{Digest, Sha256};

use crate::error::{DecodeError, Part};
use crate::limits::{EXTRAS_MAX, TEXT_LEN_MAX};
use crate::wire::{self, Field, Message, UnknownFields, Writer};

/// Which weights. The wire is that of ModelExpress's `SourceIdentity`, field by field.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SourceIdentity {
    /// Version of the producer.
    pub producer_version: String,
    /// ModelExpress's number for the kind of source; 0: weights.
    pub source_type: u32,
    /// Model name.
    pub model: String,
    /// ModelExpress's number for the serving framework.
    pub framework: u32,
    /// Tensor-parallel size.
    pub tensor_parallel: u32,
    /// Pipeline-parallel size.
    pub pipeline_parallel: u32,
    /// Expert-parallel size.
    pub expert_parallel: u32,
    /// Data type.
    pub dtype: String,
    /// Quantisation; empty: none.
    pub quantization: String,
    /// Anything else that tells sources apart, in the order of the wire; keys may repeat there.
    pub extra: Vec<(String, String)>,
    /// Revision of the model.
    pub revision: String,
    /// What compiled artefacts depend on, in the order of [`COMPATIBILITY`]; empty: no matter.
    pub compatibility: [String; 6],
    /// Fields of a newer schema.
    pub unknown: UnknownFields,
}

/// What [`SourceIdentity::compatibility`] holds.
pub const COMPATIBILITY: [&str; 6] = [
    "backend_framework_version",
    "torch_version",
    "cuda_version",
    "triton_version",
    "gpu_arch",
    "compile_config_digest",
];

impl SourceIdentity {
    /// The 16 hexadecimal digits under which ModelExpress, server and client, knows this source: the
    /// start of the SHA-256 of its canonical JSON.
    #[must_use]
    pub fn source_id(&self) -> String {
        let digest = Sha256::digest(self.canonical_json());
        digest[..8].iter().fold(String::new(), |mut hex, byte| {
            // Writing to a string cannot fail.
            let _ = write!(hex, "{byte:02x}");
            hex
        })
    }

    /// Sorted keys, no spaces, texts in lower case, other than ASCII escaped; compatibility only where
    /// it says something, so that older ids stay.
    fn canonical_json(&self) -> String {
        let text = |value: &str| quoted(&value.to_lowercase());
        let mut fields = BTreeMap::from([
            ("mx_version", text(&self.producer_version)),
            ("mx_source_type", self.source_type.to_string()),
            ("model_name", text(&self.model)),
            ("backend_framework", self.framework.to_string()),
            ("tensor_parallel_size", self.tensor_parallel.to_string()),
            ("pipeline_parallel_size", self.pipeline_parallel.to_string()),
            ("expert_parallel_size", self.expert_parallel.to_string()),
            ("dtype", text(&self.dtype)),
            ("quantization", text(&self.quantization)),
            ("extra_parameters", self.extra_json()),
            ("revision", text(&self.revision)),
        ]);
        let given = COMPATIBILITY.iter().zip(&self.compatibility).filter(|(_, value)| !value.is_empty());
        fields.extend(given.map(|(&key, value)| (key, text(value))));
        object(fields.into_iter())
    }

    /// Sorted by the key as given; of keys that differ only in case, the first counts.
    fn extra_json(&self) -> String {
        let as_given: BTreeMap<&String, &String> =
            self.extra.iter().map(|(key, value)| (key, value)).collect();
        let mut lower: BTreeMap<String, String> = BTreeMap::new();
        for (key, value) in as_given {
            lower.entry(key.to_lowercase()).or_insert_with(|| value.to_lowercase());
        }
        object(lower.iter().map(|(key, value)| (key.as_str(), quoted(value))))
    }
}

fn object<'a>(fields: impl Iterator<Item = (&'a str, String)>) -> String {
    let fields: Vec<String> = fields.map(|(key, value)| format!("{}:{value}", quoted(key))).collect();
    format!("{{{}}}", fields.join(","))
}

fn quoted(text: &str) -> String {
    let mut out = String::from('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            ' '..='~' => out.push(c),
            _ => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    // Writing to a string cannot fail.
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
        }
    }
    out.push('"');
    out
}

impl Message for SourceIdentity {
    const PART: Part = Part::Source;

    fn field(&mut self, field: &Field<'_>) -> Result<bool, DecodeError> {
        match field.number {
            1 => self.producer_version = field.text(TEXT_LEN_MAX)?,
            2 => self.source_type = field.number()?,
            3 => self.model = field.text(TEXT_LEN_MAX)?,
            4 => self.framework = field.number()?,
            5 => self.tensor_parallel = field.number()?,
            6 => self.pipeline_parallel = field.number()?,
            7 => self.expert_parallel = field.number()?,
            8 => self.dtype = field.text(TEXT_LEN_MAX)?,
            9 => self.quantization = field.text(TEXT_LEN_MAX)?,
            10 => {
                let mut entries: Vec<Entry> = Vec::new();
                field.push(&mut entries, EXTRAS_MAX - self.extra.len())?;
                self.extra.extend(entries.into_iter().map(|entry| (entry.key, entry.value)));
            }
            11 => self.revision = field.text(TEXT_LEN_MAX)?,
            number @ 12..=17 => self.compatibility[number as usize - 12] = field.text(TEXT_LEN_MAX)?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn write(&self, out: &mut Writer) {
        out.bytes(1, &self.producer_version);
        out.u64(2, self.source_type);
        out.bytes(3, &self.model);
        out.u64(4, self.framework);
        out.u64(5, self.tensor_parallel);
        out.u64(6, self.pipeline_parallel);
        out.u64(7, self.expert_parallel);
        out.bytes(8, &self.dtype);
        out.bytes(9, &self.quantization);
        for (key, value) in &self.extra {
            let entry = Entry { key: key.clone(), value: value.clone(), ..Entry::default() };
            out.present(10, wire::encode(&entry));
        }
        out.bytes(11, &self.revision);
        for (number, text) in (12..).zip(&self.compatibility) {
            out.bytes(number, text);
        }
    }

    fn unknown(&self) -> &UnknownFields {
        &self.unknown
    }

    fn unknown_mut(&mut self) -> &mut UnknownFields {
        &mut self.unknown
    }
}

/// An entry of a protobuf map. Protobuf gives entries no further fields; what comes anyway is dropped.
#[derive(Debug, Default)]
struct Entry {
    key: String,
    value: String,
    unknown: UnknownFields,
}

impl Message for Entry {
    const PART: Part = Part::Entry;

    fn field(&mut self, field: &Field<'_>) -> Result<bool, DecodeError> {
        match field.number {
            1 => self.key = field.text(TEXT_LEN_MAX)?,
            2 => self.value = field.text(TEXT_LEN_MAX)?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn write(&self, out: &mut Writer) {
        out.bytes(1, &self.key);
        out.bytes(2, &self.value);
    }

    fn unknown(&self) -> &UnknownFields {
        &self.unknown
    }

    fn unknown_mut(&mut self) -> &mut UnknownFields {
        &mut self.unknown
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn deepseek() -> SourceIdentity {
        SourceIdentity {
            producer_version: "0.3.0".into(),
            model: "deepseek-ai/DeepSeek-V3".into(),
            framework: 1,
            tensor_parallel: 8,
            pipeline_parallel: 1,
            expert_parallel: 8,
            dtype: "bfloat16".into(),
            ..SourceIdentity::default()
        }
    }

    /// Both ids come from `compute_mx_source_id` of the modelexpress 0.7.0 wheel.
    #[test]
    fn ids_are_those_of_the_python_client() {
        let mut identity = deepseek();
        assert_eq!(identity.source_id(), "48629edf6f552ee8");
        identity.extra = vec![("a".into(), "Ünï\u{7f}😀".into()), ("B".into(), "Q\"\\\n".into())];
        identity.compatibility[4] = "SM_90".into();
        identity.revision = "ABC".into();
        assert_eq!(identity.source_id(), "d20cb3f4c30736f1");
    }

    #[test]
    fn keys_that_differ_in_case_count_once_in_byte_order() {
        let extra = |pairs: &[(&str, &str)]| {
            let extra = pairs.iter().map(|&(key, value)| (key.into(), value.into())).collect();
            SourceIdentity { extra, ..deepseek() }.source_id()
        };
        assert_eq!(extra(&[("k", "2"), ("K", "1")]), extra(&[("K", "1")]));
        assert_ne!(extra(&[("k", "2"), ("K", "1")]), extra(&[("k", "2")]));
    }
}
