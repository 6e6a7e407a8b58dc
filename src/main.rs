//! Entry point: parse, run, turn an error into one line, its hint and an exit code.
fn main() {}
