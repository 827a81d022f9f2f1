//! The `ibex` command.
fn main() {}
