//! The token that clients present.

use std::fmt;

use sha2::{Digest, Sha256};
use tonic::metadata::{Ascii, MetadataMap, MetadataValue};

use crate::error::InputError;

const HEADER: &str = "authorization";
const SCHEME: &str = "Bearer ";

/// A shared token. Never shown: not in errors, not in debug output.
#[derive(Clone)]
pub struct Secret {
    header: MetadataValue<Ascii>,
}

impl Secret {
    /// A token of 8 to 4096 visible ASCII characters; white space around it is ignored.
    ///
    /// # Errors
    /// [`InputError`] otherwise; the token itself is not repeated.
    pub fn new(token: &str) -> Result<Self, InputError> {
        let token = token.trim();
        let refusal = || InputError::new("token", "(not shown)", "8 to 4096 visible ASCII characters");
        let is_good = (8..=4096).contains(&token.len()) && token.bytes().all(|byte| byte.is_ascii_graphic());
        if !is_good {
            return Err(refusal());
        }
        let mut header: MetadataValue<Ascii> = format!("{SCHEME}{token}").parse().map_err(|_| refusal())?;
        header.set_sensitive(true);
        Ok(Self { header })
    }

    /// Puts the token into a request.
    pub(super) fn sign(&self, metadata: &mut MetadataMap) {
        metadata.insert(HEADER, self.header.clone());
    }

    /// Whether a request carries this token. Digests are compared, so that the time it takes says nothing
    /// about how much of a guess is right.
    pub(super) fn matches(&self, metadata: &MetadataMap) -> bool {
        let digest = |value: &MetadataValue<Ascii>| Sha256::digest(value.as_bytes());
        metadata.get(HEADER).is_some_and(|given| digest(given) == digest(&self.header))
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(not shown)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_same_token_matches_and_none_is_shown() {
        let secret = Secret::new(" correct horse\n".replace(' ', "-").trim()).unwrap();
        let mut metadata = MetadataMap::new();
        assert!(!secret.matches(&metadata));
        Secret::new("battery-staple").unwrap().sign(&mut metadata);
        assert!(!secret.matches(&metadata));
        secret.sign(&mut metadata);
        assert!(secret.matches(&metadata));
        assert_eq!(format!("{secret:?}"), "Secret(not shown)");
        for bad in ["", "short", "two words here", "tränen-sind-kein-token"] {
            let error = Secret::new(bad).unwrap_err();
            assert_eq!(&*error.value, "(not shown)", "{bad}");
        }
    }
}
