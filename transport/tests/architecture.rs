//! The tests that ARCHITECTURE.md names for bad input are there.

use std::fs;
use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// Everything that is Rust, below.
fn sources(dir: PathBuf, into: &mut String) {
    for entry in fs::read_dir(dir).unwrap().flatten() {
        let (path, kind) = (entry.path(), entry.file_type().unwrap());
        if kind.is_dir() && entry.file_name() != "corpus" {
            sources(path, into);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            into.push_str(&fs::read_to_string(path).unwrap());
        }
    }
}

/// Whether a name in the table's column of tests leads somewhere.
fn exists(name: &str, sources: &str) -> bool {
    if name.contains('/') {
        // A file or folder of tests, or a script.
        let places =
            ["", "transport", "transport/proto"].map(|place| root().join(place).join(name));
        return places
            .iter()
            .any(|place| place.exists() || place.with_extension("rs").exists());
    }
    match name.rsplit_once("::") {
        Some((module, "tests")) => {
            let file = root().join("transport/src").join(module.replace("::", "/"));
            file.with_extension("rs").exists()
        }
        Some((_, test)) => sources.contains(&format!("fn {test}(")),
        // A crate, or a test by its own name.
        None if name.contains('_') => sources.contains(&format!("fn {name}(")),
        None => true,
    }
}

#[test]
fn the_tests_that_the_table_of_bad_input_names_exist() {
    let text = fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    let (_, table) = text.split_once("### Bad input").unwrap();
    let rows = table.lines().skip_while(|line| !line.starts_with("|---"));
    let rows: Vec<_> = rows
        .skip(1)
        .take_while(|line| line.starts_with('|'))
        .collect();
    assert!(rows.len() >= 15, "{}", rows.len());
    let mut all = String::new();
    for place in ["transport", "tools"] {
        sources(root().join(place), &mut all);
    }
    for row in rows {
        let tests = row.trim_end_matches('|').rsplit('|').next().unwrap();
        // What stands between backticks.
        for name in tests.split('`').skip(1).step_by(2) {
            assert!(
                exists(name, &all),
                "there is no {name}, which stands for{row}"
            );
        }
    }
}
