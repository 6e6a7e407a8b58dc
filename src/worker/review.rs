//! What clients said of the image of a job with `approve`, from the first signal on, which may come before the image
//! and even before the run.
//!
//! Pure. The last word counts; what comes when nobody asked, or after the decision, is ignored.

/// Another image, as a `replace_image` signal names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Replacement {
    /// Its id, unchecked.
    pub(crate) image: String,
    /// Whether the job goes on with it at once.
    pub(crate) approve: bool,
}

/// What is to be done next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Go on.
    Approved,
    /// Take this image, then ask again.
    Replaced(Replacement),
}

/// Whether the job asks for an approval.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Asking {
    /// The request was not read yet.
    #[default]
    Unknown,
    Yes,
    No,
}

/// The signals so far.
#[derive(Debug, Default)]
pub(crate) struct Review {
    asking: Asking,
    is_approved: bool,
    /// Why it was rejected, empty when nobody said.
    rejected: Option<String>,
    replacement: Option<Replacement>,
    note: Option<String>,
}

impl Review {
    /// The request was read: it asks for an approval, or what was said so far is void.
    pub(crate) fn open(&mut self, asks: bool) {
        *self = if asks {
            Self { asking: Asking::Yes, ..std::mem::take(self) }
        } else {
            Self { asking: Asking::No, ..Self::default() }
        };
    }

    /// Whether the job is to wait for an approval.
    pub(crate) fn asks(&self) -> bool {
        self.asking == Asking::Yes
    }

    /// The job goes on; later signals change nothing.
    pub(crate) fn close(&mut self) {
        self.open(false);
    }

    /// What was approved of is no more: the job asks anew.
    pub(crate) fn open_again(&mut self) {
        *self = Self { asking: Asking::Yes, ..Self::default() };
    }

    /// The image is good.
    pub(crate) fn approve(&mut self) {
        self.is_approved = self.asking != Asking::No;
        if self.asking == Asking::Unknown {
            self.rejected = None;
        }
    }

    /// The image is not good, and the job is to end.
    pub(crate) fn reject(&mut self, reason: String) {
        if self.asking != Asking::No {
            self.rejected = Some(reason);
        }
    }

    /// Another image is to take its place; `None` when the signal named none.
    pub(crate) fn replace(&mut self, replacement: Option<Replacement>) {
        if self.asking == Asking::No {
            return;
        }
        if replacement.is_some() {
            // An approval so far was one of another image.
            self.is_approved = false;
            self.replacement = replacement;
        } else {
            self.refuse("a replace_image signal without an image, want {\"image\": ID}");
        }
    }

    /// A replacement was not taken: the job keeps its image and asks again.
    pub(crate) fn refuse(&mut self, why: &str) {
        self.is_approved = false;
        self.note = Some(why.to_owned());
    }

    /// Why the job is to end, as its last message.
    pub(crate) fn rejection(&self) -> Option<String> {
        let reason = self.rejected.as_ref().filter(|_| self.asking == Asking::Yes)?;
        Some(if reason.is_empty() { "rejected".into() } else { format!("rejected: {reason}") })
    }

    /// What is to be done next, once; `None` while nobody said.
    pub(crate) fn verdict(&mut self) -> Option<Verdict> {
        if let Some(replacement) = self.replacement.take() {
            self.is_approved |= replacement.approve;
            self.note = None;
            return Some(Verdict::Replaced(replacement));
        }
        self.is_approved.then_some(Verdict::Approved)
    }

    /// Whether [`verdict`](Self::verdict) has an answer.
    pub(crate) fn is_decided(&self) -> bool {
        self.is_approved || self.replacement.is_some()
    }

    /// What the status says while the job waits.
    pub(crate) fn message(&self) -> String {
        let note = self.note.as_ref().map(|note| format!("; not taken: {note}"));
        format!("waiting for approval{}", note.unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(approve: bool) -> Option<Replacement> {
        Some(Replacement { image: "an id".into(), approve })
    }

    fn asked() -> Review {
        let mut review = Review::default();
        review.open(true);
        review
    }

    #[test]
    fn a_decision_holds_for_one_image() {
        let mut review = asked();
        review.approve();
        review.close();
        review.open_again();
        assert!(review.asks() && !review.is_decided());
        review.approve();
        assert_eq!(review.verdict(), Some(Verdict::Approved));
    }

    #[test]
    fn what_comes_before_the_request_was_read_counts_where_it_asks() {
        for (asks, approved, rejected) in [(true, true, true), (false, false, false)] {
            let mut review = Review::default();
            review.approve();
            review.reject("too dark".into());
            review.open(asks);
            assert_eq!(review.is_decided(), approved);
            assert_eq!(review.rejection(), rejected.then(|| "rejected: too dark".to_owned()));
        }
    }

    #[test]
    fn signals_nobody_asked_for_change_nothing() {
        let mut review = asked();
        review.close();
        review.approve();
        review.reject("late".into());
        review.replace(image(true));
        review.replace(None);
        assert_eq!((review.verdict(), review.rejection()), (None, None));
        assert_eq!(review.message(), "waiting for approval");
    }

    #[test]
    fn an_approval_is_one_of_the_image_that_was_last() {
        let mut review = asked();
        review.approve();
        review.replace(image(false));
        assert!(matches!(review.verdict(), Some(Verdict::Replaced(_))));
        assert_eq!(review.verdict(), None, "the new image was not approved of");
        review.replace(image(false));
        review.approve();
        assert!(matches!(review.verdict(), Some(Verdict::Replaced(_))));
        assert_eq!(review.verdict(), Some(Verdict::Approved));
        let mut review = asked();
        review.replace(image(true));
        assert!(matches!(review.verdict(), Some(Verdict::Replaced(_))));
        review.refuse("it does not decode");
        assert_eq!(review.verdict(), None, "nobody approved of the old image");
        assert_eq!(review.message(), "waiting for approval; not taken: it does not decode");
        review.replace(image(true));
        review.replace(image(false));
        assert_eq!(
            review.verdict(),
            image(false).map(Verdict::Replaced),
            "the last replacement counts"
        );
    }
}
