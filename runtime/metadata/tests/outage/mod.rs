//! The long outage of the contract, short by default, at its promised length with `IBEX_FULL=1`.

use ibex_metadata::contract::{OutagePlan, Subject, long_outage};

pub(crate) async fn run(store: &str, subject: &dyn Subject) {
    let full = std::env::var_os("IBEX_FULL").is_some_and(|value| value == "1");
    let plan = if full { OutagePlan::FULL } else { OutagePlan::SHORT };
    println!("{store}: {plan:?}");
    println!("{store}: {:?}", long_outage(subject, plan).await);
}
