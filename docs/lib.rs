//! The book is the Markdown beside this file; start at `README.md`. The crate exists for its tests, which keep the book
//! true: links lead somewhere, commands name examples that exist, and every chapter is in the table of contents.
