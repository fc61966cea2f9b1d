//! The shim that containerd starts.

fn main() -> anyhow::Result<()> {
    crab::shim::bootstrap::main()
}
