//! Writing: permission, blobs, manifests.

use reqwest::header::{ACCEPT, CONTENT_TYPE, HeaderValue};
use reqwest::{Method, StatusCode};
use tokio::sync::OnceCell;
use url::Url;

use super::address::Endpoint;
use super::auth::Scopes;
use super::pull::content_digest;
use super::transport::Payload;
use super::upload::{Blob, BlobContent, Upload, Uploaded};
use super::{Client, RegistryError};
use crate::image::{Descriptor, Digest, ManifestError, RawManifest, Reference, Repository};
use crate::store::GrowingBlob;

/// How a blob came to be where it was wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PushedBlob {
    /// It was there, or this client had pushed it before.
    AlreadyThere,
    /// The registry took it from another of its repositories.
    Mounted,
    /// It was sent.
    Uploaded,
}

/// What came of asking for a mount.
enum Mount {
    Done,
    /// The registry began an upload instead, as it may.
    Session(Url),
    /// No, for whatever reason; the upload that follows will tell if it matters.
    Refused,
}

impl Client {
    /// Asks whether `repository` may be pushed to, by beginning an upload and cancelling it.
    ///
    /// # Errors
    /// The registry's answer, where it is no.
    pub async fn check_push(&self, repository: &Repository) -> Result<(), RegistryError> {
        let endpoint = self.registry(repository);
        let scopes = Scopes::push(&endpoint.name);
        let call = self
            .transport()
            .call(&endpoint, &scopes, Method::POST, "blobs/uploads/")
            .await?;
        let answer = self.transport().send(&call).await?;
        let location = self.upload_location(&endpoint, &answer).await?;
        self.cancel_upload(&endpoint, &scopes, location).await;
        Ok(())
    }

    /// Brings a blob into the repository `to`, with as few bytes sent as can be.
    ///
    /// Asks whether it is there; else has it mounted from `mount_from` (or the repository
    /// that `content` names) where that is at the same registry; else uploads it. Of
    /// calls for the same blob and repository at one time, one does this and the others
    /// wait for it. `progress` gets the number of bytes on their way so far, at most
    /// `descriptor.size`; it goes back where an attempt has to be repeated.
    ///
    /// # Errors
    /// Any but [`RegistryError::Manifest`] and [`RegistryError::Config`];
    /// [`RegistryError::Content`] where not `to` but what `content` names has failed.
    pub async fn push_blob(
        &self,
        to: &Repository,
        descriptor: &Descriptor,
        mount_from: Option<&Repository>,
        content: BlobContent,
        progress: impl Fn(u64) + Send + Sync,
    ) -> Result<PushedBlob, RegistryError> {
        let slot = self.push_slot(to, &descriptor.digest);
        let mut done = slot.lock().await;
        if *done {
            return Ok(PushedBlob::AlreadyThere);
        }
        let pushed = self
            .push_blob_alone(to, descriptor, mount_from, content, &progress)
            .await?;
        *done = true;
        Ok(pushed)
    }

    async fn push_blob_alone(
        &self,
        to: &Repository,
        descriptor: &Descriptor,
        mount_from: Option<&Repository>,
        content: BlobContent,
        progress: &(dyn Fn(u64) + Send + Sync),
    ) -> Result<PushedBlob, RegistryError> {
        let endpoint = self.registry(to);
        let scopes = Scopes::push(&endpoint.name);
        let digest = &descriptor.digest;
        if self.blob_exists(&endpoint, &scopes, digest).await? {
            return Ok(PushedBlob::AlreadyThere);
        }
        let from = mount_from.or(match &content {
            BlobContent::Remote(repository) => Some(repository),
            BlobContent::File(_) | BlobContent::Bytes(_) => None,
        });
        let mut session = None;
        if let Some(from) = from
            && from.registry() == to.registry()
            && from.name() != to.name()
        {
            match self.mount(&endpoint, from, digest).await? {
                Mount::Done => return Ok(PushedBlob::Mounted),
                Mount::Session(location) => session = Some(location),
                Mount::Refused => {}
            }
        }
        let upload = Upload {
            client: self,
            endpoint: &endpoint,
            scopes: &scopes,
            to,
            blob: Blob::Known(descriptor, content.into()),
            number: self.new_upload(),
            progress,
        };
        upload.run(session).await?;
        Ok(PushedBlob::Uploaded)
    }

    /// Brings a blob into the repository `to` while it is still being written.
    ///
    /// The upload follows the writer. Where the registry turns out to have the blob when its
    /// digest is known, the upload is cancelled. Nothing comes of it where the registry takes
    /// no bytes without a length: then [`Self::push_blob`] does it when the blob is complete.
    /// `progress` gets the number of bytes on their way so far, as there.
    ///
    /// # Errors
    /// As [`Self::push_blob`]; [`RegistryError::Content`] where the blob was given up.
    pub async fn push_growing(
        &self,
        to: &Repository,
        growing: &GrowingBlob,
        progress: impl Fn(u64) + Send + Sync,
    ) -> Result<Option<PushedBlob>, RegistryError> {
        let endpoint = self.registry(to);
        let upload = Upload {
            client: self,
            endpoint: &endpoint,
            scopes: &Scopes::push(&endpoint.name),
            to,
            blob: Blob::Growing {
                growing,
                was_there: OnceCell::new(),
            },
            number: self.new_upload(),
            progress: &progress,
        };
        Ok(match upload.run(None).await? {
            Uploaded::Sent => Some(PushedBlob::Uploaded),
            Uploaded::AlreadyThere => Some(PushedBlob::AlreadyThere),
            Uploaded::Refused => None,
        })
    }

    async fn mount(
        &self,
        endpoint: &Endpoint,
        from: &Repository,
        digest: &Digest,
    ) -> Result<Mount, RegistryError> {
        let scopes = Scopes::mount(&endpoint.name, from.name());
        let mut call = self
            .transport()
            .call(endpoint, &scopes, Method::POST, "blobs/uploads/")
            .await?;
        call.url
            .query_pairs_mut()
            .append_pair("mount", digest.as_str())
            .append_pair("from", from.name());
        match self.transport().send(&call).await {
            Ok(answer) if answer.status() == StatusCode::CREATED => Ok(Mount::Done),
            Ok(answer) => {
                let location = self.upload_location(endpoint, &answer).await?;
                Ok(Mount::Session(location))
            }
            Err(error) => {
                tracing::debug!(%error, blob = %digest, "not mounted: uploading");
                Ok(Mount::Refused)
            }
        }
    }

    /// Puts a manifest or index under the tag of `to`, or under its digest where it has no tag.
    ///
    /// Says whether it was sent: where the tag names this digest already, nothing is.
    ///
    /// # Errors
    /// Those of a request; [`RegistryError::Digest`] where `to` has a digest and the
    /// manifest another, or where the registry stored something else.
    pub async fn push_manifest(
        &self,
        to: &Reference,
        manifest: &RawManifest,
    ) -> Result<bool, RegistryError> {
        if let Some(want) = to.digest()
            && *want != manifest.digest
        {
            return Err(RegistryError::Digest {
                what: format!("the manifest for {to}"),
                got: manifest.digest.clone(),
                want: want.clone(),
            });
        }
        let endpoint = self.registry(to.repository());
        let scopes = Scopes::push(&endpoint.name);
        let path = format!("manifests/{}", to.tag().unwrap_or(manifest.digest.as_str()));
        let media_type = HeaderValue::from_str(manifest.media_type.as_str()).map_err(|_| {
            RegistryError::Manifest {
                reference: to.to_string(),
                source: Box::new(ManifestError::Unsupported(manifest.media_type.clone())),
            }
        })?;
        let mut head = self
            .transport()
            .call(&endpoint, &scopes, Method::HEAD, &path)
            .await?;
        head.headers.insert(ACCEPT, media_type.clone());
        head.accept = &[StatusCode::NOT_FOUND];
        let there = self.transport().send(&head).await?;
        if there.status() != StatusCode::NOT_FOUND
            && content_digest(&there).as_ref() == Some(&manifest.digest)
        {
            return Ok(false);
        }
        let mut put = self
            .transport()
            .call(&endpoint, &scopes, Method::PUT, &path)
            .await?;
        put.headers.insert(CONTENT_TYPE, media_type);
        put.payload = Payload::Bytes(manifest.bytes.clone().into());
        // The same bytes under the same name may be put twice, so this may be repeated.
        let answer = self.transport().send(&put).await?;
        match content_digest(&answer) {
            Some(got) if got != manifest.digest => Err(RegistryError::Digest {
                what: format!("what {} stored as the manifest of {to}", endpoint.registry),
                got,
                want: manifest.digest.clone(),
            }),
            _ => Ok(true),
        }
    }
}
