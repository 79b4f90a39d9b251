use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::Path,
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
    thread,
    time::{Duration, SystemTime},
};

use tempfile::TempDir;

use super::{key::tests::inputs, store::Building, *};
use crate::files;

const PLENTY: u64 = 1 << 40;
const MEMORY: &[u8] = &[7; 100_000];

fn store(budget: u64) -> (TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("snapshots"), budget).unwrap();
    (dir, store)
}

fn of(vcpus: u32) -> Inputs {
    Inputs { vcpus, ..inputs() }
}

fn filled(store: &Store, inputs: Inputs) -> Building {
    let building = store.build(inputs).unwrap();
    fs::write(building.dir().join("memory"), MEMORY).unwrap();
    fs::write(building.dir().join("state"), "registers").unwrap();
    building
}

fn published(store: &Store, vcpus: u32) -> Key {
    filled(store, of(vcpus)).publish(vec![], u64::MAX).unwrap()
}

fn names(store: &Store) -> BTreeSet<String> {
    fs::read_dir(&store.root).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// As if it had been used so many seconds ago.
fn unused_for(store: &Store, key: &Key, seconds: u64) {
    let dir = fs::File::open(store.root.join(key.as_str())).unwrap();
    dir.set_modified(SystemTime::now() - Duration::from_secs(seconds)).unwrap();
}

#[test]
fn a_snapshot_is_absent_until_it_is_published_and_then_complete() {
    let (_dir, store) = store(PLENTY);
    let building = filled(&store, inputs());
    let key = inputs().key();
    assert!(store.find(&key).unwrap().is_none());
    assert!(store.list().unwrap().is_empty());
    let refusal = Refusal::new(crate::vmm::Rung::Standard, "os error 22");
    assert_eq!(building.publish(vec![refusal.clone()], u64::MAX).unwrap(), key);

    let found = store.find(&key).unwrap().unwrap();
    assert_eq!(fs::read(found.dir().join("memory")).unwrap(), MEMORY);
    assert_eq!(found.manifest().inputs, inputs());
    assert_eq!(found.manifest().refusals, [refusal]);
    assert_eq!(found.manifest().files.keys().collect::<Vec<_>>(), ["memory", "state"]);
    let [entry] = &store.list().unwrap()[..] else { panic!() };
    assert!(entry.key == key && entry.bytes >= MEMORY.len() as u64);
    store.verify(&key).unwrap();
    assert!(matches!(store.build(inputs()), Err(BuildError::Exists { .. })));
    assert!(store.find(&of(2).key()).unwrap().is_none());
}

#[test]
fn a_look_at_its_digests_is_no_use_of_a_snapshot() {
    let (_dir, store) = store(PLENTY);
    let (older, newer) = (published(&store, 1), published(&store, 2));
    unused_for(&store, &older, 60);
    unused_for(&store, &newer, 30);
    store.verify(&older).unwrap();
    let order: Vec<Key> = store.list().unwrap().into_iter().map(|entry| entry.key).collect();
    assert_eq!(order, [newer.clone(), older.clone()]);
    store.find(&older).unwrap().unwrap();
    assert_eq!(store.list().unwrap()[0].key, older);
}

#[test]
fn two_published_at_once_keep_the_budget() {
    let (_dir, store) = store(3 * MEMORY.len() as u64 / 2);
    let building = [1, 2, 3, 4].map(|vcpus| filled(&store, of(vcpus)));
    thread::scope(|scope| {
        let publishing = building.map(|one| scope.spawn(|| one.publish(vec![], u64::MAX).unwrap()));
        for one in publishing {
            one.join().unwrap();
        }
    });
    assert_eq!(store.list().unwrap().len(), 1);
}

#[test]
fn one_builds_at_a_time_and_one_that_gives_up_leaves_nothing() {
    let (_dir, store) = store(PLENTY);
    let building = filled(&store, inputs());
    assert!(matches!(store.build(inputs()), Err(BuildError::Busy { .. })));
    let other = filled(&store, of(2));
    building.clear().unwrap();
    assert_eq!(fs::read_dir(building.dir()).unwrap().count(), 0);
    assert!(matches!(store.build(inputs()), Err(BuildError::Busy { .. })));
    drop(building);
    drop(other);
    assert!(names(&store).is_empty());
    drop(filled(&store, inputs()));
}

#[test]
fn what_killed_processes_left_is_never_found_and_removed_by_the_next() {
    let (_dir, store) = store(PLENTY);
    let key = published(&store, 1);
    // A builder that was killed before and after it wrote the manifest, and a remover in the middle.
    let half = store.root.join(format!(".new-{}", of(2).key()));
    fs::create_dir(&half).unwrap();
    fs::write(half.join("memory"), "half").unwrap();
    let whole = store.root.join(format!(".new-{}", of(3).key()));
    fs::create_dir(&whole).unwrap();
    for name in ["manifest.json", "memory", "state"] {
        fs::copy(store.root.join(key.as_str()).join(name), whole.join(name)).unwrap();
    }
    fs::create_dir(store.root.join(format!(".old-{key}-0"))).unwrap();
    for vcpus in [2, 3] {
        assert!(store.find(&of(vcpus).key()).unwrap().is_none());
    }
    // The next builder begins anew.
    let building = store.build(of(2)).unwrap();
    assert_eq!(fs::read_dir(building.dir()).unwrap().count(), 0);
    // One that is alive is left alone.
    assert!(store.prune(PLENTY).unwrap().evicted.is_empty());
    assert_eq!(names(&store), BTreeSet::from([key.to_string(), format!(".new-{}", of(2).key())]));
    drop(building);
    let half_gone = store.root.join(format!(".old-{key}-0"));
    fs::create_dir(&half_gone).unwrap();
    fs::write(half_gone.join("memory"), "half").unwrap();
    store.remove(&key).unwrap();
    assert!(names(&store).is_empty());
}

#[test]
fn one_in_use_stays_and_the_longest_unused_goes_first() {
    let (_dir, store) = store(PLENTY);
    let keys: Vec<Key> = (1..=4).map(|vcpus| published(&store, vcpus)).collect();
    for (key, seconds) in keys.iter().zip([400, 300, 200, 100]) {
        unused_for(&store, key, seconds);
    }
    let each = store.list().unwrap()[0].bytes;
    // The second is used now, the first is used all the time.
    drop(store.find(&keys[1]).unwrap().unwrap());
    let in_use = store.find(&keys[0]).unwrap().unwrap();
    unused_for(&store, &keys[0], 400);
    assert!(matches!(store.remove(&keys[0]), Err(EvictError::InUse { .. })));
    let evicted = store.prune(2 * each).unwrap().evicted;
    assert_eq!(evicted.iter().map(|evicted| &evicted.key).collect::<Vec<_>>(), [&keys[2], &keys[3]]);
    assert_eq!(store.prune(0).unwrap().evicted.len(), 1);
    drop(in_use);
    assert_eq!(store.prune(0).unwrap().evicted.len(), 1);
    assert!(matches!(store.remove(&keys[0]), Err(EvictError::Missing { .. })));
    assert!(names(&store).is_empty());
}

#[test]
fn what_does_not_fit_its_manifest_is_refused() {
    type Spoil = fn(&Path);
    let cases: [(Spoil, &str); 8] = [
        (|dir| fs::write(dir.join("memory"), [8; 100_000]).unwrap(), "memory has changed"),
        (|dir| fs::write(dir.join("memory"), [7; 99_999]).unwrap(), "memory has 99999 bytes and not 100000"),
        (|dir| fs::remove_file(dir.join("state")).unwrap(), "state is missing"),
        (|dir| fs::remove_file(dir.join("manifest.json")).unwrap(), "manifest.json is missing"),
        (|dir| fs::write(dir.join("manifest.json"), "{").unwrap(), "manifest.json is none"),
        (|dir| fs::write(dir.join("manifest.json"), vec![b' '; 2 << 20]).unwrap(), "manifest.json has 2097152 bytes"),
        (
            |dir| {
                let text = fs::read_to_string(dir.join("manifest.json")).unwrap();
                fs::write(dir.join("manifest.json"), text.replace("\"vcpus\": 1", "\"vcpus\": 2")).unwrap();
            },
            "manifest.json is that of another",
        ),
        // The memory of what was verified is no way round it.
        (
            |dir| {
                fs::write(dir.join("memory"), [8; 100_000]).unwrap();
                fs::write(dir.join("verified.json"), "{\"files\": {\"memory\": 1}}").unwrap();
            },
            "memory has changed",
        ),
    ];
    for (spoil, expected) in cases {
        let (_dir, store) = store(PLENTY);
        let key = published(&store, 1);
        spoil(&store.root.join(key.as_str()));
        let error = store.find(&key).unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains("chsnap snapshot rm"), "{error}");
        assert!(store.verify(&key).is_err());
        assert_eq!(store.list().unwrap().len(), 1);
        // It stays until there is somebody who makes another, who has its place then.
        let building = filled(&store, of(1));
        assert_eq!(names(&store).len(), 1);
        assert_eq!(building.publish(vec![], u64::MAX).unwrap(), key);
        assert!(store.find(&key).unwrap().is_some());
    }
    // A copy is the same, once its digests were taken again.
    let (_dir, store) = store(PLENTY);
    let key = published(&store, 1);
    let memory = store.root.join(key.as_str()).join("memory");
    fs::remove_file(&memory).unwrap();
    fs::write(&memory, MEMORY).unwrap();
    let in_use = store.find(&key).unwrap().unwrap();
    // One from which somebody lives makes room, and stays for as long as that.
    fs::write(&memory, "spoilt").unwrap();
    filled(&store, of(1)).publish(vec![], u64::MAX).unwrap();
    assert!(store.find(&key).unwrap().is_some());
    assert_eq!(names(&store).len(), 2);
    drop(in_use);
    store.keep_budget().unwrap();
    assert_eq!(names(&store).len(), 1);
}

#[test]
fn the_newest_does_not_go_again_at_once() {
    let (_dir, store) = store(300_000);
    let used = store.find(&published(&store, 1)).unwrap().unwrap();
    let old = published(&store, 2);
    // What nobody uses gives way.
    let new = published(&store, 3);
    assert!(store.find(&old).unwrap().is_none());
    let both = (used, store.find(&new).unwrap().unwrap());
    let error = filled(&store, of(4)).publish(vec![], u64::MAX).unwrap_err();
    assert!(matches!(error, BuildError::Full { .. }) && error.to_string().contains("[snapshot] budget"), "{error}");
    assert_eq!(store.list().unwrap().len(), 2);
    // Nor does one that nobody uses give way to what does not fit all the same.
    let (used, idle) = both;
    drop(idle);
    let large = filled(&store, of(5));
    fs::write(large.dir().join("more"), [1; 150_000]).unwrap();
    let error = large.publish(vec![], u64::MAX).unwrap_err();
    assert!(matches!(error, BuildError::Full { .. }), "{error}");
    assert!(store.find(&new).unwrap().is_some());
    drop(used);
    // One that cannot be read counts, too.
    fs::write(store.root.join(new.as_str()).join("manifest.json"), "{").unwrap();
    assert!(store.list().unwrap().iter().all(|entry| entry.bytes >= 100_000));
}

/// Its users have it on the disk until they end.
#[test]
fn one_that_was_displaced_counts_while_it_is_used() {
    let (_dir, store) = store(250_000);
    let key = published(&store, 1);
    let used = store.find(&key).unwrap().unwrap();
    store.displace(&key).unwrap();
    assert_eq!(names(&store), BTreeSet::from([format!(".old-{key}-0")]));
    let two = published(&store, 2);
    let in_use = store.find(&two).unwrap().unwrap();
    let error = filled(&store, of(1)).publish(vec![], u64::MAX).unwrap_err();
    assert!(matches!(error, BuildError::Full { in_use: 200_000.., .. }), "{error}");
    drop(in_use);
    // What nobody uses gives way to the rest.
    let key = published(&store, 1);
    assert!(store.find(&two).unwrap().is_none() && store.find(&key).unwrap().is_some());
    // What another removes is not in use.
    drop(used);
    let old = store.root.join(format!(".old-{key}-0"));
    let _removed = files::lock_dir(&old).unwrap();
    assert_eq!(store.displaced().unwrap(), 0);
    assert!(published(&store, 3) != key && store.find(&key).unwrap().is_some());
}

#[test]
fn one_that_is_there_is_published_although_the_store_cannot_be_written_to_the_disk() {
    let (_dir, store) = store(PLENTY);
    let no_disk = |path: &Path| if path == store.root { Err(std::io::ErrorKind::Other.into()) } else { Ok(()) };
    let key = filled(&store, of(1)).publish_with(vec![], u64::MAX, &no_disk).unwrap();
    assert!(store.find(&key).unwrap().is_some());
    // Before it is there, there is nothing to be told of.
    let nothing = |_: &Path| Err(std::io::ErrorKind::Other.into());
    let error = filled(&store, of(2)).publish_with(vec![], u64::MAX, &nothing).unwrap_err();
    assert!(matches!(error, BuildError::Io { .. }), "{error}");
    assert_eq!(names(&store), BTreeSet::from([key.to_string()]));
}

#[test]
fn a_root_difference_is_kept_whole() {
    let (_dir, store) = store(PLENTY);
    let building = filled(&store, inputs());
    let cache = building.dir().join(ROOT).join("usr/lib/__pycache__");
    fs::create_dir_all(&cache).unwrap();
    fs::write(cache.join("app.pyc"), MEMORY).unwrap();
    let key = building.publish(vec![], u64::MAX).unwrap();
    let dir = store.root.join(key.as_str());
    let found = store.find(&key).unwrap().unwrap();
    assert_eq!(found.manifest().root.as_ref().map(|root| root.entries), Some(4));
    assert!(store.list().unwrap()[0].bytes >= 2 * MEMORY.len() as u64);
    drop(found);
    let file = dir.join(ROOT).join("usr/lib/__pycache__/app.pyc");
    fs::write(&file, [8; 100_000]).unwrap();
    for error in [store.find(&key).map(drop).unwrap_err(), store.verify(&key).unwrap_err()] {
        assert!(error.to_string().contains("root has changed"), "{error}");
    }
    fs::remove_dir_all(dir.join(ROOT)).unwrap();
    let error = store.find(&key).unwrap_err().to_string();
    assert!(error.contains("root is missing"), "{error}");
    store.remove(&key).unwrap();
    assert!(names(&store).is_empty());
}

#[test]
fn what_cannot_be_kept_is_refused_and_gone() {
    let (_dir, store) = store(50_000);
    let error = filled(&store, inputs()).publish(vec![], u64::MAX).unwrap_err();
    assert!(matches!(error, BuildError::TooLarge { budget: 50_000, .. }), "{error}");
    for strange in [|path: &Path| fs::create_dir(path).unwrap(), |path: &Path| symlink("/etc/passwd", path).unwrap()] {
        let building = filled(&store, inputs());
        strange(&building.dir().join("strange"));
        let error = building.publish(vec![], u64::MAX).unwrap_err();
        assert!(matches!(error, BuildError::Strange { .. }), "{error}");
    }
    assert!(names(&store).is_empty());
}

#[test]
fn a_store_that_others_could_write_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
    assert!(matches!(Store::open(dir.path(), PLENTY), Err(OpenError::Open { .. })));
    let (_dir, store) = store(PLENTY);
    assert_eq!(fs::metadata(&store.root).unwrap().permissions().mode() & 0o777, 0o700);
    fs::write(store.root.join("file"), "").unwrap();
    assert!(matches!(Store::open(&store.root.join("file"), PLENTY), Err(OpenError::Io { .. })));
}

/// A file, where a directory is expected, is not removed by anybody.
#[test]
fn what_cannot_be_removed_is_told_and_holds_up_nothing() {
    let (_dir, store) = store(PLENTY);
    let (one, two) = (published(&store, 1), published(&store, 2));
    let stuck = [format!(".new-{}", of(9).key()), format!(".old-{one}-0")];
    stuck.iter().for_each(|name| fs::write(store.root.join(name), "").unwrap());
    let left = store.root.join(format!(".old-{two}-0"));
    fs::create_dir(&left).unwrap();
    store.remove(&one).unwrap();
    let pruned = store.prune(0).unwrap();
    assert_eq!(pruned.evicted.iter().map(|evicted| &evicted.key).collect::<Vec<_>>(), [&two]);
    assert_eq!(pruned.stayed.len(), 2, "{pruned:?}");
    assert!(!left.exists());
    let key = published(&store, 1);
    assert!(store.find(&key).unwrap().is_some());
    assert_eq!(names(&store), stuck.into_iter().chain([key.to_string()]).collect());
}

/// Locks belong to open files, so threads are to each other what processes are.
#[test]
fn builders_readers_and_removers_at_once() {
    let (_dir, store) = store(PLENTY);
    let (done, found, built, removed) =
        (AtomicBool::new(false), AtomicU32::new(0), AtomicU32::new(0), AtomicU32::new(0));
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    match store.build(inputs()) {
                        Ok(building) => {
                            fs::write(building.dir().join("memory"), MEMORY).unwrap();
                            building.publish(vec![], u64::MAX).unwrap();
                            built.fetch_add(1, Ordering::Relaxed);
                        }
                        Err(BuildError::Busy { .. } | BuildError::Exists { .. }) => thread::yield_now(),
                        Err(error) => panic!("{error}"),
                    }
                }
            });
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    if let Some(found_one) = store.find(&inputs().key()).unwrap() {
                        thread::yield_now();
                        assert_eq!(fs::read(found_one.dir().join("memory")).unwrap(), MEMORY);
                        found.fetch_add(1, Ordering::Relaxed);
                    }
                    // Else the readers would have it between them all the time.
                    thread::sleep(Duration::from_millis(3));
                }
            });
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    match store.remove(&inputs().key()) {
                        Ok(()) => drop(removed.fetch_add(1, Ordering::Relaxed)),
                        Err(EvictError::InUse { .. } | EvictError::Missing { .. }) => {}
                        Err(error) => panic!("{error}"),
                    }
                    thread::sleep(Duration::from_millis(1));
                    store.prune(PLENTY).unwrap();
                }
            });
        }
        let enough = || [&found, &built, &removed].iter().all(|count| count.load(Ordering::Relaxed) >= 20);
        let limit = SystemTime::now() + Duration::from_secs(60);
        while !enough() && SystemTime::now() < limit {
            thread::sleep(Duration::from_millis(5));
        }
        done.store(true, Ordering::Relaxed);
        assert!(enough(), "found {found:?}, built {built:?}, removed {removed:?}");
    });
    store.prune(0).unwrap();
    assert!(names(&store).is_empty());
}
