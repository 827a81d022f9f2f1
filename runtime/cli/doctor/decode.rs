//! Refusals in the words that devices, kernels and this program use, turned into sentences.
//!
//! Pure. Understood are lines of the kernel's log ("INIT2RTR_QP(0x503) op_mod(0x0) failed, status bad parameter(0x3),
//! syndrome (0x4bb88f)"), our own ("command INIT2RTR_QP failed: status 0x03 BAD_PARAM, syndrome 0x4bb88f, ..") and
//! completions ("cqe 0x13 0x88").

use ibex_abi::cqe::{Syndrome, VendorSyndrome};
use ibex_abi::prm::{Op, Status};
use ibex_hca::explain;

use super::super::CliError;

/// What is said where nothing was understood.
const EXPECTED: &str =
    "a command's name or opcode with a status (a line of dmesg will do), or \"cqe SYNDROME VENDOR\"";

/// Explains `text`.
///
/// # Errors
/// Nothing in it is known.
pub(super) fn explain(text: &str) -> Result<String, CliError> {
    completion(text).or_else(|| command(text)).ok_or(CliError::Unclear { expected: EXPECTED })
}

/// The first number after a word, with or without 0x, brackets and text between.
fn number_after(text: &str, word: &str) -> Option<u32> {
    let rest = &text[text.find(word)? + word.len()..];
    let start = rest.find("0x")?;
    let digits: String = rest[start + 2..].chars().take_while(char::is_ascii_hexdigit).collect();
    u32::from_str_radix(&digits, 16).ok()
}

fn completion(text: &str) -> Option<String> {
    let rest = text.trim().strip_prefix("cqe")?;
    let mut numbers =
        rest.split_whitespace().map(|word| u8::from_str_radix(word.trim_start_matches("0x"), 16));
    let syndrome = Syndrome(numbers.next()?.ok()?);
    let vendor = VendorSyndrome(numbers.next().and_then(Result::ok).unwrap_or(0));
    Some(format!(
        "completion with error, syndrome {syndrome}, vendor syndrome {vendor}\n{}",
        explain::completion(syndrome, vendor)
    ))
}

fn command(text: &str) -> Option<String> {
    // The longest name first: one may be a part of another.
    let mut named: Vec<Op> = Op::ALL.iter().copied().filter(|op| text.contains(op.name())).collect();
    named.sort_unstable_by_key(|op| op.name().len());
    let op = named
        .last()
        .copied()
        .or_else(|| Op::from_code(number_after(text, "opcode")?.try_into().ok()?).ok())?;
    let code = number_after(text, "status").and_then(|code| u8::try_from(code).ok());
    let by_name =
        || Status::ALL.iter().copied().find(|status| text.contains(status.name()) && *status != Status::Ok);
    let status = code.and_then(|code| Status::from_code(code).ok()).or_else(by_name)?;
    let syndrome = match number_after(text, "syndrome") {
        Some(syndrome) => {
            format!(", syndrome {syndrome:#x} (the firmware's own number; its vendor can look it up)")
        }
        None => String::new(),
    };
    Some(format!("{op} ended with status {status}{syndrome}\n{}", explain::command(op, status)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_the_kernel_is_understood() {
        let line = "mlx5_core 0000:04:00.0: mlx5_cmd_check:795:(pid 9993): INIT2RTR_QP(0x503) op_mod(0x0) \
            failed, status bad parameter(0x3), syndrome (0x4bb88f)";
        let said = explain(line).unwrap();
        assert!(said.contains("INIT2RTR_QP ended with status 0x03 BAD_PARAM, syndrome 0x4bb88f"), "{said}");
        assert!(said.contains("GID index"), "{said}");
    }

    #[test]
    fn our_own_words_are_understood() {
        let error = ibex_hca::CommandError::new(Op::Rtr2RtsQp.code(), Status::BadQpState, 0x12, None);
        let said = explain(&error.to_string()).unwrap();
        assert!(said.contains("RTR2RTS_QP ended with status 0x10 BAD_QP_STATE, syndrome 0x12"), "{said}");
        assert!(explain("INIT2RTR_QP BAD_PARAM").unwrap().contains("GID index"));
    }

    #[test]
    fn completions_are_understood() {
        assert!(explain("cqe 0x13 0x88").unwrap().contains("key"));
        assert!(explain("cqe 15").unwrap().contains("4791"));
    }

    #[test]
    fn what_is_not_understood_says_what_is() {
        for text in ["", "hello", "INIT2RTR_QP", "status 0x3", "cqe", "cqe zz"] {
            let error = explain(text).unwrap_err();
            assert!(error.to_string().contains("dmesg"), "{text}: {error}");
            assert_eq!(error.exit_code(), 2);
        }
    }
}
