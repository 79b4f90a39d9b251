use std::{
    fs,
    path::{Path, PathBuf},
};

use super::{ImageOrder, Order, TemplateError, build, image::is_of_no_image, is_lasting};
use crate::{
    config::Config,
    origin::testing::{CHAIN_ID, client, place},
    snapshot::Layers,
    task::chain,
};

/// For a pod `container` whose root consists of `lowers`, in whose place nothing more than containerd is there.
fn order(dir: &Path, client: &Path, container: &str, lowers: &[PathBuf]) -> Order {
    let mut config = Config::default();
    config.snapshot.dir = dir.join("snapshots");
    config.state.dir = dir.join("state");
    config.snapshot.ctr = client.into();
    // Nothing is built: there is no place for a builder.
    config.snapshot.builders = 0;
    let streams = serde_json::json!({ "stdin": false, "stdout": true, "stderr": true, "terminal": false });
    let blueprint = serde_json::json!({
        "spec": { "ociVersion": "1.0.2" }, "ready": "notify", "streams": streams, "own_env": [],
    });
    let blueprint = serde_json::from_value(blueprint).unwrap();
    let image = Some(ImageOrder { blueprint, lowers: Some(lowers.to_vec()), place: place(container) });
    Order { config, vcpus: 1, memory_mib: 256, beside: true, image }
}

#[tokio::test]
async fn an_image_is_named_before_anything_is_built_and_by_its_own_layers_alone() {
    let dir = tempfile::tempdir().unwrap();
    let layer = |name: &str| dir.path().join(name);
    let (one, two) = (vec![layer("2"), layer("1")], vec![layer("3")]);
    one.iter().chain(&two).for_each(|layer| fs::create_dir(layer).unwrap());
    let web = client(dir.path(), CHAIN_ID, &one);
    let known = |order: &Order, lowers: &[PathBuf]| {
        Layers::load(&order.config.snapshot.dir).chain_id(lowers).map(str::to_owned)
    };
    // The pod had other layers: its name is another's by now.
    let other = order(dir.path(), &web, "web", &two);
    assert!(matches!(build(&other, &mut |_| ()).await, Err(TemplateError::Busy(0))));
    assert_eq!((known(&other, &two), known(&other, &one)), (None, None));
    let order = order(dir.path(), &web, "web", &one);
    assert!(matches!(build(&order, &mut |_| ()).await, Err(TemplateError::Busy(0))));
    assert_eq!(known(&order, &one).as_deref(), Some(CHAIN_ID));
}

#[tokio::test]
async fn only_a_root_of_no_image_is_remembered_as_one() {
    let dir = tempfile::tempdir().unwrap();
    let lowers = [dir.path().to_owned()];
    let web = client(dir.path(), "", &lowers);
    for (container, layers, expected) in
        [("web", &lowers[..], true), ("gone", &lowers[..], false), ("web", &[PathBuf::from("/other")][..], false)]
    {
        let order = order(dir.path(), &web, container, layers);
        let error = order.image.as_ref().unwrap().name(&order.config).await.unwrap_err();
        assert_eq!(is_of_no_image(&error), expected, "{container}: {}", chain(&error));
        assert!(!is_lasting(&error));
    }
}
