#include "lmdb_reader.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace rcmstr {
namespace {

constexpr uint32_t kMagic = 0xBEEFC0DE, kVersion = 1;
constexpr uint64_t kNoPage = ~uint64_t{0};
constexpr uint32_t kPageHeader = 16, kNodeHeader = 8, kMetaSize = 136;
constexpr uint16_t kBranch = 0x01, kLeaf = 0x02, kOverflow = 0x04, kMeta = 0x08, kLeaf2 = 0x20, kSubPage = 0x40;
constexpr uint16_t kKinds = kBranch | kLeaf | kOverflow | kMeta | kLeaf2 | kSubPage;
constexpr uint16_t kBigData = 0x01;
constexpr int kMaxDepth = 32;  // liblmdb's own cursor stack

// Each field is read once: a writer may change the mapped file between two reads.
template <class T>
T load(const char* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

// n of the key `kind`-n with nine digits, otherwise 0.
uint64_t number_of(std::string_view key, std::string_view kind) {
  if (key.size() != kind.size() + 10 || key.substr(0, kind.size()) != kind || key[kind.size()] != '-') return 0;
  uint64_t number = 0;
  for (const char digit : key.substr(kind.size() + 1)) {
    if (digit < '0' || digit > '9') return 0;
    number = 10 * number + static_cast<uint64_t>(digit - '0');
  }
  return number;
}

// n of the key `kind`-n whose digits are those of printf's %0*d; nothing for other keys.
std::optional<uint64_t> formed_number(std::string_view key, std::string_view kind, size_t digits) {
  const size_t stem = kind.size() + 1;
  if (key.size() < stem + digits || key.size() > stem + 18) return std::nullopt;
  if (key.size() > stem + digits && key[stem] == '0') return std::nullopt;
  uint64_t number = 0;
  for (const char digit : key.substr(stem)) {
    if (digit < '0' || digit > '9') return std::nullopt;
    number = 10 * number + static_cast<uint64_t>(digit - '0');
  }
  return number;
}

struct Descriptor {
  int fd;
  ~Descriptor() {
    if (fd >= 0) close(fd);
  }
};

}  // namespace

struct LmdbReader::Meta {
  uint64_t page_size, root, entries, last_page, transaction;
  uint32_t version;
  uint16_t flags, depth;
};

struct LmdbReader::Page {
  const char* at;
  uint32_t keys, lower;
  bool leaf;
};

struct LmdbReader::Node {
  std::string_view key;
  uint32_t low32;  // branch: child page, low bits; leaf: size of the value
  uint16_t flags;  // branch: child page, high bits
  uint32_t value_offset;
};

void LmdbReader::Unmap::operator()(char* mapped) const noexcept { munmap(mapped, size); }

LmdbReader::LmdbReader(const std::string& data_file) {
  const Descriptor file{open(data_file.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)};
  struct stat status {};
  if (file.fd < 0 || fstat(file.fd, &status) != 0) throw LmdbError(std::string("cannot be opened: ") + strerror(errno));
  if (!S_ISREG(status.st_mode) || status.st_size < static_cast<off_t>(kPageHeader + kMetaSize))
    throw LmdbError("not an LMDB data file: too short or not a file");
  size_ = static_cast<uint64_t>(status.st_size);
  void* mapped = mmap(nullptr, size_, PROT_READ, MAP_SHARED, file.fd, 0);
  if (mapped == MAP_FAILED) throw LmdbError(std::string("cannot be mapped: ") + strerror(errno));
  mapping_ = std::unique_ptr<char, Unmap>(static_cast<char*>(mapped), Unmap{size_});
  data_ = mapping_.get();
  const Meta meta = newest_meta();
  if (meta.version != kVersion)
    throw LmdbUnsupported("LMDB format version " + std::to_string(meta.version) + ", expected 1");
  if (meta.flags != 0) throw LmdbUnsupported("the main database has flags " + std::to_string(meta.flags));
  page_size_ = meta.page_size;
  pages_ = size_ / page_size_;
  root_ = meta.root;
  depth_ = meta.depth;
  entries_ = root_ == kNoPage ? 0 : meta.entries;
  if (meta.last_page >= pages_ && meta.last_page < kNoPage) lost_pages_ = meta.last_page + 1 - pages_;
  madvise(mapped, size_, MADV_RANDOM);
  if (root_ == kNoPage || tree_page(root_)) return;
  listed_leaf({});
  if (leaves_.empty()) throw LmdbError("truncated or damaged: none of its records can be found");
}

void LmdbReader::list_leaves() const {
  madvise(mapping_.get(), size_, MADV_SEQUENTIAL);
  for (uint64_t number = 2; number < pages_; ++number) {
    const std::optional<Page> page = tree_page(number);
    if (!page || !page->leaf || page->keys == 0) continue;
    const std::optional<Node> first = node(*page, 0), last = node(*page, page->keys - 1);
    if (!first || !last || last->key < first->key) continue;
    leaves_.push_back({std::string(first->key), std::string(last->key), number, 0});
  }
  std::sort(leaves_.begin(), leaves_.end(), [](const Leaf& a, const Leaf& b) { return a.first < b.first; });
  for (size_t i = 1; i < leaves_.size(); ++i) {
    const size_t before = leaves_[i - 1].reach;
    leaves_[i].reach = leaves_[before].last > leaves_[i].last ? before : i;
  }
  madvise(mapping_.get(), size_, MADV_RANDOM);
  listed_ = true;
}

// A listed leaf that has the key. Several may cover it, since superseded pages stay in the file.
std::optional<uint64_t> LmdbReader::listed_leaf(std::string_view key) const noexcept {
  std::call_once(list_once_, [this] { list_leaves(); });
  auto after = std::upper_bound(leaves_.begin(), leaves_.end(), key,
                                [](std::string_view wanted, const Leaf& leaf) { return wanted < leaf.first; });
  while (after != leaves_.begin()) {
    const Leaf& leaf = *--after;
    if (leaves_[leaf.reach].last < key) break;
    const std::optional<Page> page = leaf.last < key ? std::nullopt : tree_page(leaf.page);
    if (page && leaf_node(*page, key)) return leaf.page;
  }
  return std::nullopt;
}

// Visits the keys with a prefix below a page, in order, until `visit` returns false; false then, and where the budget
// of pages is used up (pages that point at each other would be walked for ever).
template <class Visit>
bool LmdbReader::walk(uint64_t number, int depth, std::string_view prefix, uint64_t& budget, const Visit& visit) const {
  const std::optional<Page> page = tree_page(number);
  if (!page) return true;
  if (depth >= kMaxDepth || budget == 0) return false;
  --budget;
  const auto starts = [prefix](std::string_view key) { return key.substr(0, prefix.size()) == prefix; };
  for (uint32_t i = 0; i < page->keys; ++i) {
    const std::optional<Node> here = node(*page, i);
    if (!here) continue;
    if (page->leaf) {
      if (starts(here->key) && !visit(here->key)) return false;
      continue;
    }
    const bool beyond = i > 0 && here->key > prefix && !starts(here->key);
    const std::optional<Node> next = i + 1 < page->keys ? node(*page, i + 1) : std::nullopt;
    if (beyond) return true;
    if (next && next->key <= prefix) continue;
    const uint64_t below = here->low32 | (static_cast<uint64_t>(here->flags) << 32);
    if (!walk(below, depth + 1, prefix, budget, visit)) return false;
  }
  return true;
}

LmdbReader::Survey LmdbReader::survey(std::string_view kind, int digits, uint64_t first, uint64_t last) const {
  Survey found;
  const std::string prefix = std::string(kind) + "-";
  uint64_t budget = pages_;
  walk(root_, 0, prefix, budget, [&](std::string_view key) {
    ++found.total;
    const std::optional<uint64_t> number = formed_number(key, kind, static_cast<size_t>(std::max(digits, 1)));
    if (!number) return true;
    found.lowest = found.formed == 0 ? *number : std::min(found.lowest, *number);
    found.highest = std::max(found.highest, *number);
    ++found.formed;
    if (first <= *number && *number <= last) ++found.inside;
    return true;
  });
  return found;
}

std::optional<std::string> LmdbReader::first_key(std::string_view prefix) const {
  std::optional<std::string> found;
  uint64_t budget = pages_;
  walk(root_, 0, prefix, budget, [&](std::string_view key) {
    found = std::string(key);
    return false;
  });
  return found;
}

uint64_t LmdbReader::largest_number(std::string_view kind) const noexcept {
  uint64_t largest = 0;
  if (!listed_) return 0;
  for (const Leaf& leaf : leaves_) {
    const std::optional<Page> page = tree_page(leaf.page);
    for (uint32_t i = 0; page && i < page->keys; ++i)
      if (const std::optional<Node> found = node(*page, i)) largest = std::max(largest, number_of(found->key, kind));
  }
  return largest;
}

std::optional<LmdbReader::Meta> LmdbReader::meta_at(uint64_t offset) const {
  if (offset + kPageHeader + kMetaSize > size_) return std::nullopt;
  const char* page = data_ + offset;
  const char* meta = page + kPageHeader;
  const uint64_t page_size = load<uint32_t>(meta + 24);
  const bool sound = (load<uint16_t>(page + 10) & kMeta) && load<uint32_t>(meta) == kMagic && page_size >= 256 &&
                     page_size <= 32768 && (page_size & (page_size - 1)) == 0;
  if (!sound) return std::nullopt;
  const char* main = meta + 72;
  return Meta{page_size,
              load<uint64_t>(main + 40),
              load<uint64_t>(main + 32),
              load<uint64_t>(meta + 120),
              load<uint64_t>(meta + 128),
              load<uint32_t>(meta + 4),
              load<uint16_t>(main + 4),
              load<uint16_t>(main + 6)};
}

// The two metas are pages 0 and 1; where the first is damaged the page size is found by trying.
LmdbReader::Meta LmdbReader::newest_meta() const {
  std::optional<Meta> newest = meta_at(0);
  for (uint64_t page_size = 256; page_size <= 32768; page_size *= 2) {
    const std::optional<Meta> other = meta_at(page_size);
    if (!other || other->page_size != page_size) continue;
    if (!newest || (newest->page_size == page_size && other->transaction > newest->transaction)) newest = other;
  }
  if (!newest) throw LmdbError("not an LMDB data file: no valid meta page");
  return *newest;
}

std::optional<LmdbReader::Page> LmdbReader::tree_page(uint64_t number) const noexcept {
  if (number >= pages_) return std::nullopt;
  const char* at = data_ + number * page_size_;
  const uint16_t kind = load<uint16_t>(at + 10) & kKinds;
  const uint32_t lower = load<uint16_t>(at + 12);
  if (load<uint64_t>(at) != number || (kind != kBranch && kind != kLeaf)) return std::nullopt;
  if (lower < kPageHeader || lower > page_size_) return std::nullopt;
  return Page{at, (lower - kPageHeader) / 2, lower, kind == kLeaf};
}

std::optional<LmdbReader::Node> LmdbReader::node(const Page& page, uint32_t i) const noexcept {
  const uint32_t offset = load<uint16_t>(page.at + kPageHeader + 2 * i);
  if (offset < page.lower || offset + kNodeHeader > page_size_) return std::nullopt;
  const char* at = page.at + offset;
  const uint32_t key_size = load<uint16_t>(at + 6), value_offset = offset + kNodeHeader + key_size;
  if (value_offset > page_size_) return std::nullopt;
  return Node{{at + kNodeHeader, key_size}, load<uint32_t>(at), load<uint16_t>(at + 4), value_offset};
}

// The last child whose key is not above the one wanted; the first child's own key counts as minus infinity.
std::optional<uint64_t> LmdbReader::child(const Page& page, std::string_view key) const noexcept {
  uint32_t low = 0, high = page.keys;
  if (high == 0) return std::nullopt;
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    const std::optional<Node> found = node(page, middle);
    if (!found) return std::nullopt;
    (found->key <= key ? low : high) = middle;
  }
  const std::optional<Node> found = node(page, low);
  if (!found) return std::nullopt;
  return found->low32 | (static_cast<uint64_t>(found->flags) << 32);
}

std::optional<LmdbReader::Node> LmdbReader::leaf_node(const Page& page, std::string_view key) const noexcept {
  uint32_t low = 0, high = page.keys;
  while (low < high) {
    const uint32_t middle = (low + high) / 2;
    const std::optional<Node> found = node(page, middle);
    if (!found) return std::nullopt;
    const int order = found->key.compare(key);
    if (order == 0) return found;
    if (order < 0)
      low = middle + 1;
    else
      high = middle;
  }
  return std::nullopt;
}

// Page number of a value that has pages of its own, if they are all there.
std::optional<uint64_t> LmdbReader::own_pages(const Page& page, const Node& node) const noexcept {
  if (node.flags != kBigData || node.value_offset + sizeof(uint64_t) > page_size_) return std::nullopt;
  const uint64_t number = load<uint64_t>(page.at + node.value_offset);
  if (number >= pages_ || number * page_size_ + kPageHeader + node.low32 > size_) return std::nullopt;
  return number;
}

std::optional<std::string_view> LmdbReader::node_value(const Page& page, const Node& node) const noexcept {
  const uint64_t value_size = node.low32;
  if (node.flags == 0) {
    if (node.value_offset + value_size > page_size_) return std::nullopt;
    return std::string_view(page.at + node.value_offset, value_size);
  }
  const std::optional<uint64_t> number = own_pages(page, node);
  if (!number) return std::nullopt;
  const char* const at = data_ + *number * page_size_;
  if ((load<uint16_t>(at + 10) & kKinds) != kOverflow || load<uint64_t>(at) != *number) return std::nullopt;
  return std::string_view(at + kPageHeader, value_size);
}

// The leaf that a key would be in, and without `read` only its number: it is not looked at. Where the way there is
// lost, a listed one.
std::optional<uint64_t> LmdbReader::leaf_of(std::string_view key, bool read) const noexcept {
  std::optional<uint64_t> number = root_;
  if (root_ == kNoPage) return std::nullopt;
  for (int depth = 1; number && depth < kMaxDepth; ++depth) {
    if (!read && depth >= depth_) return number;
    const std::optional<Page> page = tree_page(*number);
    if (!page) break;
    if (page->leaf) return number;
    number = child(*page, key);
  }
  return listed_leaf(key);
}

std::optional<std::string_view> LmdbReader::find(std::string_view key) const noexcept {
  const std::optional<uint64_t> leaf = leaf_of(key, true);
  const std::optional<Page> page = leaf ? tree_page(*leaf) : std::nullopt;
  const std::optional<Node> found = page ? leaf_node(*page, key) : std::nullopt;
  return found ? node_value(*page, *found) : std::nullopt;
}

void LmdbReader::fetch_leaf(std::string_view key) const noexcept {
  const std::optional<uint64_t> leaf = leaf_of(key, false);
  if (leaf && *leaf < pages_) fetch(*leaf * page_size_, page_size_);
}

void LmdbReader::fetch_value(std::string_view key) const noexcept {
  const std::optional<uint64_t> leaf = leaf_of(key, true);
  const std::optional<Page> page = leaf ? tree_page(*leaf) : std::nullopt;
  const std::optional<Node> found = page ? leaf_node(*page, key) : std::nullopt;
  const std::optional<uint64_t> number = found ? own_pages(*page, *found) : std::nullopt;
  if (number) fetch(*number * page_size_, kPageHeader + found->low32);
}

void LmdbReader::fetch(uint64_t begin, uint64_t size) const noexcept {
  static const uint64_t system_page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  const uint64_t first = begin / system_page * system_page;
  madvise(mapping_.get() + first, begin + size - first, MADV_WILLNEED);
}

}  // namespace rcmstr
