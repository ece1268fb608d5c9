"""Sites: where a function contracts its leaves or looks them up, and what can be done there."""
