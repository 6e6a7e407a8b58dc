//! Entry point: everything is in `cli`; what it could not do becomes one line, a hint and an exit code there.

use std::process::ExitCode;

fn main() -> ExitCode {
    genvideo::cli::main(std::env::args_os())
}
