"""Entry points of other engines: each subpackage or module needs its engine, and nothing else imports them."""
