//! The checked-in header is what cbindgen makes of the sources.
//!
//! After a change: `LOWTIDE_WRITE_HEADER=1 cargo test -p lowtide-capi --test header`.

use std::path::Path;

#[test]
fn the_header_is_that_of_the_sources() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(root.join("cbindgen.toml")).unwrap();
    let mut made = Vec::new();
    // It follows the modules.
    let sources = cbindgen::Builder::new().with_src(root.join("src/lib.rs"));
    let bindings = sources.with_config(config).generate().unwrap();
    bindings.write(&mut made);
    let made = String::from_utf8(made).unwrap();
    let path = root.join("include/lowtide.h");
    if std::env::var_os("LOWTIDE_WRITE_HEADER").is_some() {
        std::fs::write(&path, &made).unwrap();
    }
    let kept = std::fs::read_to_string(&path).unwrap();
    let differs = made
        .lines()
        .zip(kept.lines())
        .find(|(made, kept)| made != kept);
    assert!(
        made == kept,
        "include/lowtide.h is not that of the sources, first at {differs:?}; \
         LOWTIDE_WRITE_HEADER=1 writes it"
    );
}
