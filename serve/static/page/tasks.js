// What an answer says of each task that the model has; where it has one, that one has no name.

import { percent } from "./elements.js";

/** Give each task's name and what is said of it. A model of one task says it of the whole, under the same names. */
export const ofEachTask = (said) => Object.entries(said.tasks ?? { "": said });

/** Name a class: with its task in front, where that has a name. */
export const classOf = (task, label) => (task ? `${task}: ${label}` : label);

/** Find the state that a class has: named with its task, or alone; undefined where it has none. */
export const stateOf = (task, label, states) => [classOf(task, label), label].find((state) => states.includes(state));

/** Give the most labels that a task has. */
export const mostLabels = (model) => Math.max(...ofEachTask(model).map(([, { labels }]) => labels.length));

/** Say what a cell is, in every task. */
export const saidOf = (cell) =>
  ofEachTask(cell)
    .map(([task, { label, probability }]) => `${classOf(task, label)}, probability ${percent(probability)}`)
    .join("; ");
