//! The `crab` command.

fn main() -> std::process::ExitCode {
    crab::cli::main()
}
