//! What a job keeps while it is at work: objects under their content hash, where each stage is and which are done.
//!
//! All of it goes when the job is cleaned up.

use bytes::Bytes;

use super::{BlobRef, Content, Error, JobKey, Store, key, of_bytes};

impl Store {
    /// Keeps `content` until the job is cleaned up: pictures and frames on their way to the next stage.
    pub fn put_work(&self, job: &JobKey, content: &[u8]) -> Result<BlobRef, Error> {
        let blob = of_bytes(content);
        let held = self.lock_work()?;
        self.put_content(&work_key(job, &blob.sha256)?, &blob, &Content::Memory(content), &held)?;
        Ok(blob)
    }

    /// What [`put_work`](Self::put_work) kept, checked against its name.
    pub fn get_work(&self, job: &JobKey, sha256: &str) -> Result<Bytes, Error> {
        self.get_checked(&work_key(job, sha256)?, sha256)
    }

    /// Whether [`put_work`](Self::put_work) kept it; its content is not checked.
    pub fn has_work(&self, job: &JobKey, sha256: &str) -> Result<bool, Error> {
        self.has(&work_key(job, sha256)?)
    }

    /// Says that the job is still open: for a sweep, its work and its blobs are of today. Nothing for a job without work.
    pub fn renew(&self, job: &JobKey) -> Result<(), Error> {
        let held = self.lock_work()?;
        if self.objects(&format!("work/{job}"), &held)?.is_empty() {
            return Ok(());
        }
        self.replace(&format!("work/{job}/open"), b"")
    }

    /// The result of `stage` that stands: `content`, unless another attempt was first.
    pub fn settle_stage(&self, job: &JobKey, stage: &str, content: &[u8]) -> Result<Bytes, Error> {
        let _held = self.lock_work()?;
        let key = stage_key(job, stage);
        if self.create(&key, content)? {
            return Ok(Bytes::copy_from_slice(content));
        }
        self.get(&key)?.ok_or(Error::Missing { key })
    }

    /// The result of `stage`, if an attempt has finished it.
    pub fn settled_stage(&self, job: &JobKey, stage: &str) -> Result<Option<Bytes>, Error> {
        self.get(&stage_key(job, stage))
    }

    /// Forgets the result of `stage`.
    pub fn unsettle_stage(&self, job: &JobKey, stage: &str) -> Result<(), Error> {
        // Attempts that race settle the same bytes again.
        let _held = self.lock_work()?;
        self.remove(&stage_key(job, stage))
    }

    /// Keeps `content`, a checkpoint of `stage`, until the stage is done.
    pub fn put_checkpoint(
        &self,
        job: &JobKey,
        stage: &str,
        content: &[u8],
    ) -> Result<BlobRef, Error> {
        let blob = of_bytes(content);
        let held = self.lock_work()?;
        let key = checkpoint_key(job, stage, &blob.sha256)?;
        self.put_content(&key, &blob, &Content::Memory(content), &held)?;
        Ok(blob)
    }

    /// What [`put_checkpoint`](Self::put_checkpoint) kept, checked against its name.
    pub fn get_checkpoint(&self, job: &JobKey, stage: &str, sha256: &str) -> Result<Bytes, Error> {
        self.get_checked(&checkpoint_key(job, stage, sha256)?, sha256)
    }

    /// Removes one checkpoint of `stage`, if it is there. Beside writers: one that puts the same again at that moment
    /// loses a checkpoint, and a worker that is frozen here holds up nobody.
    pub fn drop_checkpoint(&self, job: &JobKey, stage: &str, sha256: &str) -> Result<(), Error> {
        let _held = self.lock_work()?;
        self.remove(&checkpoint_key(job, stage, sha256)?)
    }

    /// Removes, beside writers too, all checkpoints of `stage`, and the note of the newest before them.
    pub fn drop_checkpoints(&self, job: &JobKey, stage: &str) -> Result<(), Error> {
        let held = self.lock_work()?;
        self.remove(&mark_key(job, stage))?;
        let folder = format!("work/{job}/{stage}");
        let listed = self.objects(&folder, &held)?;
        listed.iter().try_for_each(|checkpoint| self.remove(checkpoint.location.as_ref()))
    }

    /// Notes that `sha256` is the newest checkpoint of `stage`.
    pub fn mark_stage(&self, job: &JobKey, stage: &str, sha256: &str) -> Result<(), Error> {
        let _held = self.lock_work()?;
        self.replace(&mark_key(job, stage), key::content_hash(sha256)?.as_bytes())
    }

    /// The newest checkpoint of `stage`, if there is one.
    pub fn stage_mark(&self, job: &JobKey, stage: &str) -> Result<Option<String>, Error> {
        let mark = self.get(&mark_key(job, stage))?;
        Ok(mark.map(|mark| String::from_utf8_lossy(&mark).into_owned()))
    }
}

fn work_key(job: &JobKey, sha256: &str) -> Result<String, Error> {
    Ok(format!("work/{job}/{}", key::content_hash(sha256)?))
}

fn checkpoint_key(job: &JobKey, stage: &str, sha256: &str) -> Result<String, Error> {
    Ok(format!("work/{job}/{stage}/{}", key::content_hash(sha256)?))
}

fn mark_key(job: &JobKey, stage: &str) -> String {
    format!("{}.at", stage_key(job, stage))
}

/// `stage` is a word of ours, never a client's.
fn stage_key(job: &JobKey, stage: &str) -> String {
    format!("work/{job}/stages/{stage}")
}
