// Read-only, bounds-checked lookups in the data file of an LMDB (format version 1, 64 bit, little endian),
// so that reading needs neither liblmdb nor the GIL. Damaged files give errors or missing values, never a crash;
// only a file that is cut shorter while it is mapped ends the process, as it does for every mmap.
//
// A truncated file has usually lost the top of its tree, which a writer puts at the end. Where the way to a key is lost,
// every leaf page in the file, superseded ones included, is listed once, and the key is looked up in these.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace rcmstr {

// Not an LMDB data file, or one without any readable page.
struct LmdbError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// An LMDB in a layout that this reader leaves to liblmdb.
struct LmdbUnsupported : LmdbError {
  using LmdbError::LmdbError;
};

class LmdbReader {
 public:
  explicit LmdbReader(const std::string& data_file);

  // The value of a key, inside the mapping. Nothing where the key is absent or the way to it is damaged.
  std::optional<std::string_view> find(std::string_view key) const noexcept;

  // Asks the kernel to fetch what `find` needs for these keys, all at once: the leaves, then the values that have pages
  // of their own. Waits for leaves only.
  template <class KeyAt>
  void prefetch(size_t count, const KeyAt& key_at) const noexcept {
    for (size_t i = 0; i < count; ++i) fetch_leaf(key_at(i));
    for (size_t i = 0; i < count; ++i) fetch_value(key_at(i));
  }

  // Keys in the database, as its newest meta page says.
  uint64_t entries() const noexcept { return entries_; }

  // Pages that the newest meta page counts and the file does not have.
  uint64_t lost_pages() const noexcept { return lost_pages_; }

  // Whether the way to a key asked for was lost, so that the leaves have been listed.
  bool damaged() const noexcept { return listed_; }

  // What the keys `kind`-n of the tree are, n written with `digits` places or more; those of another form only count
  // in `total`. `inside`: keys of the form with first <= n <= last. Lost parts of a damaged tree are left out.
  struct Survey {
    uint64_t total = 0, formed = 0, lowest = 0, highest = 0, inside = 0;
  };
  Survey survey(std::string_view kind, int digits, uint64_t first, uint64_t last) const;

  // The first key of the tree, in the order of bytes, that begins with the prefix.
  std::optional<std::string> first_key(std::string_view prefix) const;

  // The largest number n of a key `kind`-n with nine digits in the leaves, if they are listed; otherwise 0.
  uint64_t largest_number(std::string_view kind) const noexcept;

 private:
  struct Unmap {
    size_t size;
    void operator()(char* mapped) const noexcept;
  };
  struct Meta;
  struct Page;
  struct Node;
  // A leaf page and its keys; `reach`: which leaf up to this one has the largest last key.
  struct Leaf {
    std::string first, last;
    uint64_t page;
    size_t reach;
  };

  std::optional<Meta> meta_at(uint64_t offset) const;
  Meta newest_meta() const;
  std::optional<Page> tree_page(uint64_t number) const noexcept;
  std::optional<Node> node(const Page& page, uint32_t i) const noexcept;
  std::optional<uint64_t> child(const Page& page, std::string_view key) const noexcept;
  std::optional<Node> leaf_node(const Page& page, std::string_view key) const noexcept;
  template <class Visit>
  bool walk(uint64_t number, int depth, std::string_view prefix, uint64_t& budget, const Visit& visit) const;
  void list_leaves() const;
  std::optional<uint64_t> listed_leaf(std::string_view key) const noexcept;
  std::optional<uint64_t> leaf_of(std::string_view key, bool read) const noexcept;
  std::optional<uint64_t> own_pages(const Page& page, const Node& node) const noexcept;
  std::optional<std::string_view> node_value(const Page& page, const Node& node) const noexcept;

  void fetch_leaf(std::string_view key) const noexcept;
  void fetch_value(std::string_view key) const noexcept;
  void fetch(uint64_t begin, uint64_t size) const noexcept;

  std::unique_ptr<char, Unmap> mapping_;
  const char* data_ = nullptr;
  uint64_t size_ = 0, page_size_ = 0, pages_ = 0, root_ = 0, entries_ = 0, lost_pages_ = 0;
  int depth_ = 0;  // levels of the tree, the leaves included
  mutable std::once_flag list_once_;
  mutable std::atomic<bool> listed_{false};
  mutable std::vector<Leaf> leaves_;  // by their first keys
};

}  // namespace rcmstr
