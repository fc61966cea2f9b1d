//! Generates the control API from its proto file.

use std::{env, error::Error, fs, path::Path};

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

fn main() -> Result<(), Box<dyn Error>> {
    let proto = "src/control/control.proto";
    println!("cargo:rerun-if-changed={proto}");
    let out = env::var("OUT_DIR")?;
    Codegen::new()
        .out_dir(&out)
        .inputs([proto])
        .include("src/control")
        .rust_protobuf()
        .customize(Customize::default())
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(false))
        .run()?;
    // Inner attributes are not allowed where the generated text is included.
    for name in ["control.rs", "control_ttrpc.rs"] {
        let path = Path::new(&out).join(name);
        let text = fs::read_to_string(&path)?;
        let kept: Vec<&str> = text
            .lines()
            .filter(|l| !l.starts_with("#![") && !l.starts_with("//!"))
            .collect();
        fs::write(&path, kept.join("\n"))?;
    }
    Ok(())
}
