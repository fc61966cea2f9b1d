//! A store that somebody else has made: what its checksums cover is right, and nothing else need be. Whatever it holds,
//! the readers say so: they do not panic, take no more memory than there is to read, and end.

use std::{collections::BTreeMap, io::Write, path::PathBuf, sync::LazyLock};

use proptest::{collection::vec, prelude::*, sample::Index};

use super::{fixture::*, memory::peak, *};
use crate::store::{
    entry::{PageRef, decode_root, kind},
    pack::{Pack, PackName, PackWriter, hostile::Parts},
};

/// What reading a foreign store may take, in bytes: some blocks of 4 MiB. The store of these tests has less than one.
const MEMORY: usize = 48 << 20;

/// The pack of a checkpoint with objects of each kind: several pages of a directory, lists of chunks, hard links, holes.
static EXAMPLE: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let bed = bed();
    let writer = bed.writer();
    let mut pending = writer.begin(TurnNo(1)).unwrap();
    let pages = [noise(1, 70 * 4096), vec![0; 300 * 4096]].concat();
    fs::write(pending.image_dir().join("pages-1.img"), pages).unwrap();
    fs::write(pending.image_dir().join("core-1.img"), "core").unwrap();
    pending.add_to_bundle("config.json", b"{}".to_vec());
    let upper = pending.upper_dir();
    fs::create_dir_all(upper.join("many/a")).unwrap();
    // Few names, many of which end a page.
    let ends_a_page = |name: &String| Digest::of(name.as_bytes()).bytes()[0] & 0x7f == 0;
    let names = (0..1000).map(|n| format!("name-{n}"));
    for name in names.filter(|name| name.len() == 6 || ends_a_page(name)) {
        symlink("target", upper.join("many").join(name)).unwrap();
    }
    fs::write(upper.join("file"), noise(2, 150_000)).unwrap();
    fs::hard_link(upper.join("file"), upper.join("many/a/again")).unwrap();
    set_xattr(&upper.join("file"), "user.note", b"text");
    commit(pending, Part::Whole);
    let graph = Graph::of(&writer.pack_path(TurnNo(1)));
    let count = |kind| {
        graph
            .objects
            .values()
            .filter(|object| object.0 == kind)
            .count()
    };
    let counts = [kind::LEAF, kind::NODE, kind::LIST].map(count);
    assert!(
        counts[0] > 3 && counts[1] > 0 && counts[2] > 1,
        "{counts:?}"
    );
    fs::read(writer.pack_path(TurnNo(1))).unwrap()
});

/// A store with that checkpoint, and where its pack is.
fn example() -> (Bed, PathBuf) {
    let bed = bed();
    let path = bed.writer().pack_path(TurnNo(1));
    fs::write(&path, &*EXAMPLE).unwrap();
    seal(&path);
    (bed, path)
}

/// It was complete: what is wrong with it is damage, and not what a power loss has left.
fn seal(path: &Path) {
    fs::set_permissions(path, fs::Permissions::from_mode(0o400)).unwrap();
}

/// Everything that reads a store. Errors are fine.
fn read_everything(store: &SandboxStore) {
    let _ = (store.head(), store.latest(), store.names(), store.armed());
    let _ = (store.verify_packs(), store.verify(TurnNo(1)));
    let Ok(checkpoint) = store.get(TurnNo(1)) else {
        return;
    };
    let _ = checkpoint.changed_reference();
    let _ = checkpoint.lay_out(&store.scratch_dir());
    if let Ok(Some(mut file)) = checkpoint.image_file("pages-1.img") {
        let mut page = vec![0; 4096];
        for at in [0, 4096 * 69 + 5, file.size().wrapping_sub(4096)] {
            let _ = file.read_exact_at(&mut page, at);
        }
    }
    if let (Ok(Some(mut a)), Ok(Some(mut b))) = (checkpoint.tree(), checkpoint.tree()) {
        let _ = a.lookup(Path::new("many/name-7"));
        let _ = a.entries_under(Path::new(""));
        let _ = a.diff(&mut b);
    }
}

/// The same, and what a writer does.
fn use_everything(bed: &Bed) {
    read_everything(&bed.store.sandbox(&bed.id));
    let Ok(writer) = bed.store.writer(&bed.id) else {
        return;
    };
    let _ = writer.retain(&Retention::newest(1));
    let _ = writer.collect();
    let Ok(base) = writer.get(TurnNo(1)) else {
        return;
    };
    let pending = writer.begin(TurnNo(2)).unwrap();
    fs::create_dir_all(pending.upper_dir().join("many")).unwrap();
    fs::write(pending.upper_dir().join("many/name-8"), "new").unwrap();
    let changes = LayerChanges {
        removed: vec!["many/name-7".into()],
        changed: vec![("many/name-8".into(), rustix::fs::FileType::RegularFile)],
    };
    let part = Part::Changes {
        base: &base,
        changes: &changes,
    };
    let _ = try_commit(pending, Images::Same(&base), part);
}

fn no_more_memory_than(limit: usize, run: impl FnOnce()) -> Result<(), TestCaseError> {
    let taken = peak(run);
    prop_assert!(taken < limit, "{taken} bytes");
    Ok(())
}

/// A change to some bytes.
#[derive(Debug, Clone)]
enum Change {
    Put(Index, Vec<u8>),
    Cut(Index, Index),
    Insert(Index, Vec<u8>),
    /// Puts some of the bytes again somewhere else.
    Copy(Index, Index, Index),
}

fn some_bytes() -> impl Strategy<Value = Vec<u8>> {
    let extreme = prop_oneof![
        Just(0u64),
        Just(1),
        Just(u64::MAX),
        Just(1 << 63),
        Just(1 << 31),
        Just((1 << 32) - 1)
    ];
    prop_oneof![
        vec(any::<u8>(), 1..9),
        (
            extreme,
            prop_oneof![Just(1usize), Just(2), Just(4), Just(8)]
        )
            .prop_map(|(number, length)| number.to_le_bytes()[..length].to_vec()),
    ]
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        6 => (any::<Index>(), some_bytes()).prop_map(|(at, bytes)| Change::Put(at, bytes)),
        1 => (any::<Index>(), any::<Index>()).prop_map(|(at, length)| Change::Cut(at, length)),
        1 => (any::<Index>(), some_bytes()).prop_map(|(at, bytes)| Change::Insert(at, bytes)),
        2 => (any::<Index>(), any::<Index>(), any::<Index>()).prop_map(|(a, b, c)| Change::Copy(a, b, c)),
    ]
}

impl Change {
    /// `keep_length`: nothing behind the change moves.
    fn make(&self, bytes: &mut Vec<u8>, keep_length: bool) {
        if bytes.is_empty() {
            return;
        }
        let length = bytes.len();
        let put = |bytes: &mut Vec<u8>, at: usize, new: &[u8]| {
            let end = length.min(at + new.len());
            bytes[at..end].copy_from_slice(&new[..end - at]);
        };
        match self {
            Self::Cut(at, _) | Self::Insert(at, _) if keep_length => {
                put(bytes, at.index(length), &[0xff]);
            }
            Self::Put(at, new) => put(bytes, at.index(length), new),
            Self::Cut(at, count) => {
                let at = at.index(length);
                bytes.drain(at..at + count.index(length - at) + 1);
            }
            Self::Insert(at, new) => {
                let at = at.index(length);
                bytes.splice(at..at, new.iter().copied());
            }
            Self::Copy(from, count, to) => {
                let from = from.index(length);
                let some = bytes[from..from + count.index(length - from) + 1].to_vec();
                put(bytes, to.index(length), &some);
            }
        }
    }
}

/// All objects of a checkpoint, and its manifest.
struct Graph {
    objects: BTreeMap<Digest, (u8, Vec<u8>)>,
    manifest: String,
}

impl Graph {
    fn of(path: &Path) -> Self {
        let mut pack = Pack::open(path).unwrap();
        let mut objects = BTreeMap::new();
        for (digest, place) in pack.objects().unwrap() {
            let block = pack.block(place.block).unwrap();
            let bytes = objects::slice(&block, &place).unwrap();
            objects.insert(digest, (place.kind, bytes.to_vec()));
        }
        let manifest = String::from_utf8(pack.manifest().unwrap().unwrap()).unwrap();
        Self { objects, manifest }
    }

    /// Puts other bytes in an object's place, and its new digest in the place of the old one, up to the manifest.
    fn replace(&mut self, old: Digest, bytes: Vec<u8>) {
        let mut todo = vec![(old, bytes)];
        while let Some((old, bytes)) = todo.pop() {
            let Some((kind, _)) = self.objects.remove(&old) else {
                continue;
            };
            let new = Digest::of_object(kind, &bytes);
            self.manifest = self.manifest.replace(&old.hex(), &new.hex());
            for (digest, (_, above)) in &self.objects {
                let refers = |at: &usize| above[*at..].starts_with(old.bytes());
                let places: Vec<usize> = (0..above.len()).filter(refers).collect();
                if !places.is_empty() {
                    let mut above = above.clone();
                    for at in places {
                        above[at..at + Digest::SIZE].copy_from_slice(new.bytes());
                    }
                    todo.push((*digest, above));
                }
            }
            self.objects.insert(new, (kind, bytes));
        }
    }

    /// Makes it the pack of a checkpoint.
    fn write(&self, path: &Path) {
        let _ = fs::remove_file(path);
        let mut writer = PackWriter::create(path).unwrap();
        for (digest, (kind, bytes)) in &self.objects {
            // Too large for any pack: then it is not there.
            let _ = writer.add(*kind, *digest, bytes);
        }
        drop(writer.finish(Some(self.manifest.as_bytes())).unwrap());
        seal(path);
    }
}

/// Puts an extreme number in the place of one of a manifest.
fn with_number(json: &str, which: &Index, number: &str) -> String {
    let is_digit = |at: &usize| json.as_bytes()[*at].is_ascii_digit();
    let begins = |at: &usize| is_digit(at) && json[..*at].ends_with("\": ");
    let all: Vec<usize> = (0..json.len()).filter(begins).collect();
    let at = all[which.index(all.len())];
    let end = (at..json.len()).find(|at| !is_digit(at)).unwrap();
    [&json[..at], number, &json[end..]].concat()
}

const NUMBERS: [&str; 8] = [
    "0",
    "1",
    "-1",
    "4096",
    "4294967296",
    "9223372036854775807",
    "18446744073709551615",
    "1e300",
];

proptest! {
    #![proptest_config(ProptestConfig { cases: ProptestConfig::default().cases / 8, ..ProptestConfig::default() })]

    #[test]
    fn no_bytes_in_an_object_make_the_readers_panic(
        which in any::<Index>(),
        changes in vec(change(), 1..4),
    ) {
        let (bed, path) = example();
        let mut graph = Graph::of(&path);
        // Chunks are bytes of files, whatever they are.
        let structure = graph.objects.iter().filter(|(_, (kind, _))| *kind != kind::CHUNK);
        let structure: Vec<_> = structure.map(|(digest, (_, bytes))| (*digest, bytes.clone())).collect();
        let (digest, mut bytes) = which.get(&structure).clone();
        changes.iter().for_each(|change| change.make(&mut bytes, false));
        graph.replace(digest, bytes);
        graph.write(&path);
        no_more_memory_than(MEMORY, || use_everything(&bed))?;
    }

    #[test]
    fn no_bytes_in_a_manifest_make_the_readers_panic(
        numbers in vec((any::<Index>(), any::<Index>()), 1..3),
        changes in vec(change(), 0..2),
    ) {
        let (bed, path) = example();
        let mut graph = Graph::of(&path);
        for (which, number) in &numbers {
            graph.manifest = with_number(&graph.manifest, which, number.get::<&str>(&NUMBERS));
        }
        let mut manifest = graph.manifest.clone().into_bytes();
        changes.iter().for_each(|change| change.make(&mut manifest, false));
        graph.manifest = String::from_utf8_lossy(&manifest).into_owned();
        graph.write(&path);
        no_more_memory_than(MEMORY, || use_everything(&bed))?;
    }

    #[test]
    fn no_bytes_in_any_part_of_a_pack_make_the_readers_panic(
        part in 0..6usize,
        number in (0..5usize, any::<Index>(), any::<u64>()),
        changes in vec(change(), 1..4),
    ) {
        let (bed, path) = example();
        let mut parts = Parts::of(&EXAMPLE);
        let bytes = match part {
            0 => &mut parts.header,
            1 => &mut parts.blocks,
            2 => &mut parts.table,
            3 => &mut parts.index,
            4 => &mut parts.manifest,
            _ => {
                let (which, extreme, any) = number;
                let extremes = [any, 0, 1, u64::MAX, u64::MAX / 44, 1 << 32, 1 << 24];
                *parts.numbers()[which] = *extreme.get(&extremes);
                &mut parts.header
            }
        };
        if part < 5 {
            changes.iter().for_each(|change| change.make(bytes, true));
        }
        parts.check_blocks();
        fs::write(&path, parts.seal()).unwrap();
        no_more_memory_than(MEMORY, || use_everything(&bed))?;
    }

    #[test]
    fn no_bytes_in_a_kept_pack_take_a_checkpoint_away(
        part in 0..4usize,
        changes in vec(change(), 1..4),
        turn in prop_oneof![Just(0u64), Just(3), Just(u64::MAX)],
    ) {
        let (bed, _) = example();
        let writer = bed.writer();
        // It has all that it needs in its own pack; beside it lies one that says that it has the same.
        let mut parts = Parts::of(&EXAMPLE);
        let part = match part {
            0 => &mut parts.header,
            1 => &mut parts.blocks,
            2 => &mut parts.table,
            _ => &mut parts.index,
        };
        changes.iter().for_each(|change| change.make(part, true));
        parts.check_blocks();
        let beside = writer.packs_dir().join(PackName::Kept(TurnNo(turn)).file());
        fs::write(&beside, parts.seal()).unwrap();
        let sound = || writer.verify(TurnNo(1)).unwrap();
        prop_assert_eq!(sound(), []);
        let laid = lay_out(&writer, TurnNo(1), &writer.scratch_dir()).unwrap();
        prop_assert_eq!(fs::read(laid.upper_dir().join("file")).unwrap(), noise(2, 150_000));
        no_more_memory_than(MEMORY, || drop(writer.collect()))?;
        prop_assert_eq!(sound(), []);
    }

    #[test]
    fn no_bytes_at_the_end_of_a_journal_take_the_next_line_away(
        lines in 0..3u64,
        garbage in vec(prop_oneof![3 => any::<u8>(), 1 => Just(b'\n'), 2 => Just(b'"')], 0..200),
        repeat in prop_oneof![3 => Just(1usize), 1 => 200..700usize],
    ) {
        let bed = bed();
        let writer = bed.writer();
        for turn in 1..=lines {
            writer.append(&journal::line(turn), Sync::Later).unwrap();
        }
        let path = writer.dir().join("journal.jsonl");
        let mut file = fs::File::options().append(true).create(true).open(&path).unwrap();
        file.write_all(&garbage.repeat(repeat)).unwrap();
        drop(writer);
        no_more_memory_than(MEMORY, || drop(bed.store.sandbox(&bed.id).journal()))?;
        let writer = bed.writer();
        let last = journal::line(9);
        writer.append(&last, Sync::Later).unwrap();
        let journal = writer.journal().unwrap();
        prop_assert_eq!(journal.lines.last(), Some(&last));
        let kept = journal.lines.iter().filter(|line| line.turn.0 <= lines).count();
        prop_assert!(kept as u64 >= lines, "{:?}", journal);
    }

    #[test]
    fn no_bytes_in_the_small_files_make_the_readers_panic(
        bytes in vec(any::<u8>(), 0..100),
        armed in "(\\{\"format\":[0-9]{1,20},\"turn\":-?[0-9]{1,21}\\})?\\PC{0,5}",
        name in "[a-z0-9./_-]{1,20}",
        number in "-?[+0]{0,2}[0-9]{1,21}[ \\n]{0,3}",
    ) {
        let (bed, _) = example();
        let writer = bed.writer();
        for content in [&bytes, armed.as_bytes()] {
            fs::write(writer.dir().join("armed"), content).unwrap();
            let _ = writer.armed();
        }
        let file = writer.dir().join("names").join(Path::new(&name).file_name().unwrap_or_default());
        let outside = bed.dir.path().join(&name);
        // Such as "." and "/".
        let was_there = outside.exists();
        for content in [&bytes, number.as_bytes()] {
            // A name may be none of a file.
            let _ = fs::write(&file, content);
            let _ = (writer.names(), writer.named(&name), writer.name(&name, TurnNo(1)));
        }
        prop_assert!(name.starts_with("crab") || outside.exists() == was_there, "{}", name);
        let _ = writer.retain(&Retention::newest(1));
        prop_assert_eq!(writer.verify(TurnNo(1)).unwrap(), []);
    }

    #[test]
    fn no_bytes_are_the_name_of_two_packs(name in "\\PC{0,30}|[+0]{0,2}[0-9]{0,21}\\.(pack|kept)") {
        if let Some(parsed) = PackName::parse(&name) {
            prop_assert_eq!(parsed.file(), name);
        }
    }
}

/// Few bytes that are many when they are decompressed.
#[test]
fn a_block_and_a_manifest_beyond_measure_are_refused() {
    let raw: u32 = 65 << 20;
    let bomb = zstd::bulk::compress(&vec![0u8; raw as usize], 1).unwrap();
    let length = bomb.len() as u64;

    let mut block = Parts::of(&EXAMPLE);
    let at = block.header.len() as u64;
    let sizes = [(length as u32).to_le_bytes(), raw.to_le_bytes()].concat();
    let check = Digest::of(&bomb);
    block.table = [&at.to_le_bytes()[..], &sizes, &check.bytes()[..16]].concat();
    block.blocks.clone_from(&bomb);
    let [table_at, blocks, ..] = block.numbers();
    (*table_at, *blocks) = (at + length, 1);

    let mut manifest = Parts::of(&EXAMPLE);
    manifest.manifest = bomb;
    let [.., stored, decompressed] = manifest.numbers();
    (*stored, *decompressed) = (length, raw.into());

    for (parts, reason) in [(block, "a block's size"), (manifest, "is larger than")] {
        let (bed, path) = example();
        fs::write(&path, parts.seal()).unwrap();
        let store = bed.store.sandbox(&bed.id);
        let faults = store.verify_packs().unwrap();
        assert!(faults[0].reason.contains(reason), "{faults:?}");
        let taken = peak(|| use_everything(&bed));
        assert!(taken < MEMORY, "{reason}: {taken} bytes");
    }
}

/// Pages that refer to one page again and again, and pages above these that do: few bytes, and more references than
/// any memory holds.
#[test]
fn a_directory_that_contains_its_pages_many_times_is_refused() {
    let (bed, path) = example();
    let mut graph = Graph::of(&path);
    let root = graph
        .objects
        .iter()
        .find(|(_, (kind, _))| *kind == kind::ROOT);
    let (root, (_, root_bytes)) = root
        .map(|(digest, object)| (*digest, object.clone()))
        .unwrap();
    let mut entry = decode_root(&root_bytes).unwrap();
    let mut below = entry.dir().unwrap().root;
    for level in 0..3 {
        let mut bytes = vec![level];
        for n in 0..1000 {
            let reference = PageRef {
                first: format!("{n:04}").into_bytes(),
                dir: DirRef {
                    root: below,
                    entries: 1,
                    data: 0,
                },
            };
            reference.encode(&mut bytes).unwrap();
        }
        below = Digest::of_object(kind::NODE, &bytes);
        graph.objects.insert(below, (kind::NODE, bytes));
    }
    entry.node = Node::Directory(DirRef {
        root: below,
        entries: 1,
        data: 0,
    });
    let mut bytes = Vec::new();
    entry.encode(&mut bytes).unwrap();
    graph.replace(root, bytes);
    graph.write(&path);
    let taken = peak(|| use_everything(&bed));
    assert!(taken < MEMORY, "{taken} bytes");
    let faults = bed.store.sandbox(&bed.id).verify(TurnNo(1)).unwrap();
    assert!(
        faults[0].reason.contains("the order of its pages"),
        "{faults:?}"
    );
}
