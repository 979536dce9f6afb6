//! An image and a store for the tests of all exporters.

use std::path::Path;

use crate::image::{
    Annotations, Descriptor, DiffId, History, Image, ImageConfig, ImageLayer, ImageOrIndex,
    MediaType, Platform, PlatformAnnotations, Reference, assemble, assemble_index,
};
use crate::rootfs::Stack;
use crate::store::Store;

use super::files::Root;

pub(super) struct Fixture {
    pub(super) dir: tempfile::TempDir,
    pub(super) store: Store,
    pub(super) image: Image,
}

/// An image of three layers, the last of which is the first again.
pub(super) fn fixture() -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("store")).unwrap();
    let image = image_of(&store, &["one", "two", "one"]);
    Fixture { dir, store, image }
}

/// An image with a layer for each text, which is a file's name and content.
pub(super) fn image_of(store: &Store, texts: &[&str]) -> Image {
    let layers = texts.iter().map(|text| {
        let mut tar = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_ustar();
        header.set_size(text.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, Path::new(text), text.as_bytes())
            .unwrap();
        let plain = tar.into_inner().unwrap();
        let digest = store.put_blob(&plain).unwrap();
        ImageLayer {
            diff_id: DiffId::from_uncompressed(digest),
            descriptor: Descriptor::of(MediaType::LAYER_TAR, &plain),
        }
    });
    let mut config = ImageConfig::scratch(Platform::parse("linux/amd64").unwrap());
    config.history = vec![History::default(); texts.len()];
    assemble(config, layers.collect(), PlatformAnnotations::default())
}

/// The files of an image for one platform, which go to no directory of their own.
pub(super) fn whole(stack: &Stack) -> [Root; 1] {
    [Root {
        platform: Platform::parse("linux/amd64").unwrap(),
        in_directory: false,
        stack: stack.clone(),
    }]
}

pub(super) fn one(image: &Image) -> ImageOrIndex {
    ImageOrIndex::Image(Box::new(image.clone()))
}

/// An index of `image`, for amd64, and of one for arm64 with a layer of its own and one of those.
pub(super) fn index_of(store: &Store, image: &Image) -> ImageOrIndex {
    let platform = |text| Platform::parse(text).unwrap();
    let images = vec![
        (platform("linux/amd64"), image.clone()),
        (platform("linux/arm64"), image_of(store, &["arm", "two"])),
    ];
    ImageOrIndex::Index(assemble_index(images, &Annotations::default()))
}

pub(super) fn tags(names: &[&str]) -> Vec<Reference> {
    names.iter().map(|n| Reference::parse(n).unwrap()).collect()
}

/// A test that cannot run says so, and fails where everything has to run.
#[allow(clippy::print_stderr, reason = "a test says that it did not run")]
pub(super) fn skip(reason: &str) {
    assert!(
        std::env::var_os("SOCKLESS_TEST_REQUIRE_ALL").is_none_or(|v| v != "1"),
        "{reason}"
    );
    eprintln!("skipped: {reason}");
}
