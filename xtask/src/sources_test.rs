// SPDX-License-Identifier: Apache-2.0 OR MIT
use super::Sources;

#[test]
fn one_line_entries_of_the_archive_are_kept_without_their_architecture() {
    let mut sources = Sources::default();
    sources.add_list(
        "# a comment\n\
         deb [arch=amd64 signed-by=/k.gpg] http://mirror.example/debian bookworm main contrib\n\
         deb-src http://mirror.example/debian bookworm main\n\
         deb http://mirror.example/debian-security bookworm-security main # own\n\
         deb http://vendor.example/repo bookworm stable\n\
         deb http://vendor.example/pg bookworm-pgdg main\n\
         deb cdrom\n",
        "bookworm",
    );
    assert_eq!(
        sources.list,
        "deb [signed-by=/k.gpg] http://mirror.example/debian bookworm main\n\
         deb http://mirror.example/debian-security bookworm-security main\n"
    );
}

#[test]
fn stanzas_of_the_archive_are_kept_with_their_key() {
    let mut sources = Sources::default();
    sources.add_stanzas(
        "Types: deb deb-src\n\
         # a comment\n\
         URIs: http://mirror.example/debian\n\
         Suites: trixie trixie-updates trixie-backports\n\
         Components: main non-free-firmware\n\
         Architectures: amd64\n\
         Signed-By:\n -----BEGIN\n .\n abc\n\
         \n\
         Types: deb\nURIs: http://vendor.example\nSuites: nodistro\nComponents: main\n\
         \n\
         Types: deb\nEnabled: no\nURIs: http://mirror.example/x\nSuites: trixie\nComponents: main\n",
        "trixie",
    );
    assert_eq!(
        sources.stanzas,
        "Types: deb\nComponents: main\nURIs: http://mirror.example/debian\nSuites: trixie trixie-updates\n\
         Signed-By:\n -----BEGIN\n .\n abc\n\n"
    );
}

#[test]
fn a_folder_with_both_formats_is_read() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("sources.list.d")).unwrap();
    std::fs::write(
        dir.path().join("sources.list"),
        "deb http://a.example/d sid main\n",
    )
    .unwrap();
    let stanza = "Types: deb\nURIs: http://b.example/d\nSuites: sid\nComponents: main\n";
    std::fs::write(dir.path().join("sources.list.d/b.sources"), stanza).unwrap();
    std::fs::write(dir.path().join("sources.list.d/c.sources.disabled"), stanza).unwrap();
    let sources = Sources::read(dir.path(), "forky").unwrap();
    assert_eq!(sources.list, "deb http://a.example/d sid main\n");
    assert_eq!(sources.stanzas.matches("b.example").count(), 1);
    assert!(!sources.is_empty());
}

#[test]
fn the_same_archive_has_debian_13_and_its_backports() {
    let own = Sources {
        list: "deb [signed-by=/k.gpg] http://mirror.example/debian bookworm main\n\
               deb http://mirror.example/debian-security bookworm-security main\n"
            .to_owned(),
        stanzas: "Types: deb\nComponents: main\nURIs: http://a.example\nSuites: bookworm bookworm-updates\nSigned-By:\n .\n x\n\n\
                  Types: deb\nComponents: main\nURIs: http://b.example\nSuites: bookworm-security\n\n"
            .to_owned(),
    };
    let other = own.of_trixie_with_backports();
    assert_eq!(
        other.list,
        "deb [signed-by=/k.gpg] http://mirror.example/debian trixie main\n\
         deb [signed-by=/k.gpg] http://mirror.example/debian trixie-updates main\n\
         deb [signed-by=/k.gpg] http://mirror.example/debian trixie-backports main\n"
    );
    assert_eq!(
        other.stanzas,
        "Types: deb\nComponents: main\nURIs: http://a.example\nSuites: trixie trixie-updates trixie-backports\nSigned-By:\n .\n x\n\n"
    );
}
